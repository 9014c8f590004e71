"""What the studio shows, a module per tab. The only rooms that import Gradio, and imported when someone asks for it."""
