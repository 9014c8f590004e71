"""The use case: request, image, stored result; and replay, library and provenance."""
