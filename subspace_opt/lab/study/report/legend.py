"""The line and marker of an optimizer as a small SVG, for the legend and the table."""

from __future__ import annotations

from ...drawing import look

_SHAPES = {
    "o": '<circle cx="14" cy="7" r="4"/>',
    "s": '<path d="M10.5 3.5h7v7h-7z"/>',
    "^": '<path d="M14 2.5l4.5 8h-9z"/>',
    "v": '<path d="M14 11.5l4.5-8h-9z"/>',
    "D": '<path d="M14 2l5 5-5 5-5-5z"/>',
    "P": '<path d="M12.5 2.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z"/>',
    "X": '<path d="M10 4.5l1.8-1.8L14 4.9l2.2-2.2L18 4.5l-2.2 2.5L18 9.5l-1.8 1.8L14 9.1l-2.2 2.2L10 9.5l2.2-2.5z"/>',
}
_DASHES = {"-": "", "--": "6 3", "-.": "7 3 2 3", ":": "2 3"}


def swatch(number: int) -> str:
    """An `<svg>` of 28 x 14 CSS pixels for the optimizer at a position of the study."""
    style = look(number)
    line = f'<path d="M0 7h28" stroke-width="2" stroke-dasharray="{_DASHES[style.dash]}"/>'
    head = f'<svg class="swatch" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true" style="color: var(--series-{style.hue})">'
    return f"{head}{line}{_SHAPES[style.marker]}</svg>"
