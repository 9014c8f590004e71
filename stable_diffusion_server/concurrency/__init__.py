"""Shared capacity: limiters and queues that are fair to callers, deadlines, and progress monitoring."""
