"""The UI's pages, one module per tab. Only these modules import Gradio; `LazyUiApp` imports them on first use."""
