"""Turns what happens into logs, figures, spans, a console bar and a heartbeat file. Decides nothing."""
