"""The words of the captions that the toys are trained with: all that their tokenizer knows."""

from __future__ import annotations

# RGB in [0, 255].
COLOURS = {
    "red": (225, 35, 35),
    "yellow": (240, 215, 30),
    "green": (35, 170, 55),
    "turquoise": (40, 200, 205),
    "blue": (40, 70, 225),
    "pink": (225, 60, 200),
}
GROUNDS = {"white": (238, 238, 238), "grey": (150, 150, 150), "black": (28, 28, 28)}
SHAPES = ("ball", "square", "triangle")
# The wordings of each motion; {go} stands for the verb of the shape.
MOTIONS = {
    "right": ("{go} to the right", "moves to the right"),
    "left": ("{go} to the left", "moves to the left"),
    "up": ("rises", "moves up"),
    "down": ("falls", "moves down"),
    "bounces": ("bounces",),
    "grows": ("grows",),
    "shrinks": ("shrinks",),
}
VERBS = {"ball": "rolls", "square": "slides", "triangle": "slides"}


def words() -> list[str]:
    """All words of captions."""
    said = [
        wording.format(go=verb)
        for wordings in MOTIONS.values()
        for wording in wordings
        for verb in (*VERBS.values(), "moves")
    ]
    listed = [*COLOURS, *GROUNDS, *SHAPES, *" ".join(said).split(), "a", "it", "on", "ground"]
    return sorted(set(listed))
