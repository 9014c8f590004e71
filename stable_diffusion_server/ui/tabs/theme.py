"""The theme: colours with enough contrast for every text."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils.colors import Color

# The blue of the icon and its neighbours, light to dark.
_BLUE = Color(
    name="studio",
    c50="#f0f4ff",
    c100="#dfe7ff",
    c200="#c3d1fe",
    c300="#9db4fb",
    c400="#7390f5",
    c500="#4a6dea",
    c600="#2d55d2",
    c700="#2445ae",
    c800="#213c8e",
    c900="#1e3472",
    c950="#131f47",
)


def theme() -> gr.themes.Base:
    """Return the theme, with fonts that every system has."""
    made: gr.themes.Base = gr.themes.Default(
        primary_hue=_BLUE,
        secondary_hue=_BLUE,
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # Contrast of at least 4.5 to 1 for every text (WCAG 2.2, 1.4.3), placeholders and hints included.
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0b1020",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_background_fill="white",
        block_background_fill_dark="#151c2f",
        block_border_color_dark="#2a3550",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="600",
        border_color_primary_dark="#2a3550",
        background_fill_secondary_dark="#10172a",
        input_background_fill_dark="#0f1627",
        input_border_color="*neutral_400",
        input_border_color_dark="#566384",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="*neutral_200",
        button_secondary_background_fill_dark="#2a3550",
        button_secondary_background_fill_hover="*neutral_300",
        button_secondary_background_fill_hover_dark="#38456a",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        button_cancel_background_fill="#b42318",
        button_cancel_background_fill_dark="#b42318",
        button_cancel_background_fill_hover="#912018",
        button_cancel_background_fill_hover_dark="#912018",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
