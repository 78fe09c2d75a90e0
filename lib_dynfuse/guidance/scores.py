"""How scores are called, and the one number that ranks pictures which have to please both references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LABELS: Mapping[str, str] = {
    "clip_subject": "CLIP-I subject",
    "clip_style": "CLIP-I style",
    "dino_subject": "DINO subject",
    "dino_style": "DINO style",
    "clip_text": "CLIP-T",
    "R": "R",
}
HARMONIC = "harmonic_mean"
# Which cosine tells of the subject and which of the style, the better one first: CLIP-I to the style picture grows as
# the style is taken over, DINO to the subject picture as the subject is kept.
_SUBJECT, _STYLE = ("dino_subject", "clip_subject"), ("clip_style", "dino_style")


def harmonic_terms(scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two scores that the harmonic mean is of, subject and style; None where one of them is missing."""
    subject = next((name for name in _SUBJECT if name in scores), None)
    style = next((name for name in _STYLE if name in scores), None)
    return None if subject is None or style is None else (subject, style)


def harmonic_mean(scores: Mapping[str, float]) -> float | None:
    """Of subject and style, near the smaller one: copying the style's content, or keeping the subject unstyled, raises
    one at the other's cost. 0 where one is not positive, None where one is missing."""
    terms = harmonic_terms(scores)
    if terms is None:
        return None
    subject, style = (scores[name] for name in terms)
    return 2 * subject * style / (subject + style) if min(subject, style) > 0 else 0.0


def as_text(scores: Mapping[str, float]) -> str:
    """One picture's scores, for its infotext: "CLIP-I subject 0.7123, DINO style 0.3100"."""
    names = {**LABELS, HARMONIC: "harmonic mean"}
    return ", ".join(f"{names[name]} {value:.4f}" for name, value in scores.items())


def best(scores: Sequence[Mapping[str, float]], count: int) -> list[int]:
    """The places of the `count` pictures with the highest harmonic means, in their old order; all where `count` is 0,
    or where it is not known of each."""
    if not 0 < count < len(scores) or any(HARMONIC not in one for one in scores):
        return list(range(len(scores)))
    ranked = sorted(range(len(scores)), key=lambda place: -scores[place][HARMONIC])
    return sorted(ranked[:count])
