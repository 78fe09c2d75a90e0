"""The device's side of kernels.py, in Triton. Imported only where Triton is there.

It builds with Triton 2.3.1 and 3.9; 2.1 (torch 2.1) fails on `statistics`, and plain torch takes its place.
"""

# What the arguments are Triton finds out at the call.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as whole numbers and multiplies them as such.
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _delta(
    h_rows, u_columns, token_ok, channel_ok, rank, h_r, u_r, BT: tl.constexpr, BC: tl.constexpr, R: tl.constexpr
):
    """hidden · up of a tile: [BT, BC] in float32. h_rows [BT, 1] and u_columns [1, BC] point at rank 0."""
    d = tl.zeros([BT, BC], dtype=tl.float32)
    for k in range(0, rank, R):
        r = k + tl.arange(0, R)
        inside = r < rank
        h = tl.load(h_rows + r[None, :] * h_r, mask=token_ok[:, None] & inside[None, :], other=0.0)
        u = tl.load(u_columns + r[:, None] * u_r, mask=inside[:, None] & channel_ok[None, :], other=0.0)
        if _WIDEN:
            h = h.to(tl.float32)
            u = u.to(tl.float32)
        d += tl.dot(h, u, allow_tf32=False)
    return d


@triton.jit
def _series(d):
    """(exp(d) - 1, d·(exp(d) - 1) - (exp(d) - 1 - d)) for |d| <= 1/4; the second has no first-order term to cancel."""
    rest = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
    grown = d + rest
    return grown, d * grown - rest


@triton.jit
def _any_size(d):
    """As `_series`, for any d whose exponential is a float32."""
    grown = tl.exp(d) - 1.0
    near_grown, near_excess = _series(d)
    near = tl.abs(d) <= 0.25
    return tl.where(near, near_grown, grown), tl.where(near, near_excess, d * grown - (grown - d))


@triton.jit
def _divergence(z, grown, excess):
    """KL = E_r[d] - log E_0[exp d], from z = Σp, Σp(exp(d) - 1) and Σp(d·(exp(d) - 1) - (exp(d) - 1 - d)), p ~ p_0."""
    a = grown / z
    direct = (1.0 + a) * tl.log(1.0 + a) - a
    series = a * a * (0.5 - a * (1 / 6 - a * (1 / 12 - a * (1 / 20 - a * (1 / 30)))))
    return (excess / z - tl.where(tl.abs(a) <= 0.0625, series, direct)) / (1.0 + a)


@triton.jit
def _closed_form(
    y_rows, h_rows, u, token_ok, peak, z, channels, rank, scale, y_c, h_r, u_r, u_c,
    BT: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """KL of one delta for tokens on which exp(d) may not be a float32: E_r[d] - (LSE(y + d) - LSE(y)), its own peak."""
    top = tl.full([BT], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BT], dtype=tl.float32)
    moved = tl.zeros([BT], dtype=tl.float32)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        ok = c < channels
        base = tl.load(y_rows + c[None, :] * y_c, mask=token_ok[:, None] & ok[None, :], other=float("-inf"))
        d = _delta(h_rows, u + c[None, :] * u_c, token_ok, ok, rank, h_r, u_r, BT, BC, R) * scale
        features = base.to(tl.float32) * scale + d
        higher = tl.maximum(top, tl.max(features, 1))
        keep = tl.exp(top - higher)
        p = tl.exp(features - higher[:, None])
        total = total * keep + tl.sum(p, 1)
        moved = moved * keep + tl.sum(p * d, 1)
        top = higher
    return moved / total - ((top - peak) + tl.log(total / z))


# Layers differ in their numbers of tokens and ranks: one build serves all of them.
@triton.jit(do_not_specialize=["tokens", "rank_subject", "rank_style"])
def statistics(
    y, h_subject, h_style, u_subject, u_style, out_subject, out_style, tokens, channels, rank_subject, rank_style,
    scale, y_b, y_t, y_c, s_b, s_t, s_r, t_b, t_t, t_r, u_r, u_c,
    BT: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Both roles' divergences of BT tokens in one read of y [B, T, C]; what comes out is [B, T], float32.

    The deltas exist in registers only. One pass over the channels keeps a running peak of y, as an online softmax does;
    only where a delta is above 16 the tokens are read again, for the closed form.
    """
    item = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    token_ok = t < tokens
    y_rows = y + item.to(tl.int64) * y_b + t[:, None] * y_t
    h_subject += item.to(tl.int64) * s_b + t[:, None] * s_t
    h_style += item.to(tl.int64) * t_b + t[:, None] * t_t

    peak = tl.full([BT], float("-inf"), dtype=tl.float32)
    z = tl.zeros([BT], dtype=tl.float32)
    grown_subject = tl.zeros([BT], dtype=tl.float32)
    grown_style = tl.zeros([BT], dtype=tl.float32)
    excess_subject = tl.zeros([BT], dtype=tl.float32)
    excess_style = tl.zeros([BT], dtype=tl.float32)
    largest_subject = tl.zeros([BT], dtype=tl.float32)
    largest_style = tl.zeros([BT], dtype=tl.float32)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        ok = c < channels
        base = tl.load(y_rows + c[None, :] * y_c, mask=token_ok[:, None] & ok[None, :], other=float("-inf"))
        features = base.to(tl.float32) * scale
        columns = c[None, :] * u_c
        subject = _delta(h_subject, u_subject + columns, token_ok, ok, rank_subject, s_r, u_r, BT, BC, R) * scale
        style = _delta(h_style, u_style + columns, token_ok, ok, rank_style, t_r, u_r, BT, BC, R) * scale
        here_subject = tl.max(tl.abs(subject), 1)
        here_style = tl.max(tl.abs(style), 1)
        largest_subject = tl.maximum(largest_subject, here_subject)
        largest_style = tl.maximum(largest_style, here_style)

        higher = tl.maximum(peak, tl.max(features, 1))
        keep = tl.exp(peak - higher)
        p = tl.exp(features - higher[:, None])
        peak = higher
        z = z * keep + tl.sum(p, 1)
        if tl.max(tl.maximum(here_subject, here_style), 0) <= 0.25:
            g_subject, e_subject = _series(subject)
            g_style, e_style = _series(style)
        else:
            g_subject, e_subject = _any_size(subject)
            g_style, e_style = _any_size(style)
        grown_subject = grown_subject * keep + tl.sum(p * g_subject, 1)
        grown_style = grown_style * keep + tl.sum(p * g_style, 1)
        excess_subject = excess_subject * keep + tl.sum(p * e_subject, 1)
        excess_style = excess_style * keep + tl.sum(p * e_style, 1)

    found_subject = _divergence(z, grown_subject, excess_subject)
    found_style = _divergence(z, grown_style, excess_style)
    if tl.max(tl.maximum(largest_subject, largest_style), 0) > 16.0:
        far_subject = _closed_form(
            y_rows, h_subject, u_subject, token_ok, peak, z, channels, rank_subject, scale, y_c, s_r, u_r, u_c,
            BT, BC, R,
        )  # fmt: skip
        far_style = _closed_form(
            y_rows, h_style, u_style, token_ok, peak, z, channels, rank_style, scale, y_c, t_r, u_r, u_c,
            BT, BC, R,
        )  # fmt: skip
        found_subject = tl.where(largest_subject > 16.0, far_subject, found_subject)
        found_style = tl.where(largest_style > 16.0, far_style, found_style)
    place = item.to(tl.int64) * tokens + t
    tl.store(out_subject + place, found_subject, mask=token_ok)
    tl.store(out_style + place, found_style, mask=token_ok)


@triton.jit(do_not_specialize=["tokens", "rank_subject", "rank_both"])
def add_winner(
    y, hidden, up, subject_wins, tokens, channels, rank_subject, rank_both,
    y_b, y_t, y_c, h_b, h_t, h_r, u_r, u_c, w_b, BT: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [B, T, C] += the product of the role that has won the item: subject_wins [B], of one byte each.

    hidden [B, T, r] and up [r, C] have the subject's ranks first.
    """
    item = tl.program_id(2)
    wins = tl.load(subject_wins + item * w_b) != 0
    first = tl.where(wins, 0, rank_subject)
    rank = tl.where(wins, rank_subject, rank_both - rank_subject)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    token_ok, channel_ok = t < tokens, c < channels
    h_rows = hidden + item.to(tl.int64) * h_b + t[:, None] * h_t + first * h_r
    d = _delta(h_rows, up + c[None, :] * u_c + first * u_r, token_ok, channel_ok, rank, h_r, u_r, BT, BC, R)
    places = y + item.to(tl.int64) * y_b + t[:, None] * y_t + c[None, :] * y_c
    ok = token_ok[:, None] & channel_ok[None, :]
    base = tl.load(places, mask=ok, other=0.0)
    tl.store(places, (base.to(tl.float32) + d).to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "rank_subject", "rank_both"])
def add_weighted(
    y, hidden, up, subject, style, tokens, channels, rank_subject, rank_both,
    y_b, y_t, y_c, h_b, h_t, h_r, u_r, u_c, w_b, w_t, BT: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [B, T, C] += subject · its product + style · its product; weights per token, strides (w_b, w_t).

    A weight of zero keeps a product out even where it is infinite.
    """
    item = tl.program_id(2)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    token_ok, channel_ok = t < tokens, c < channels
    h_rows = hidden + item.to(tl.int64) * h_b + t[:, None] * h_t
    u_columns = up + c[None, :] * u_c
    places = y + item.to(tl.int64) * y_b + t[:, None] * y_t + c[None, :] * y_c
    ok = token_ok[:, None] & channel_ok[None, :]
    weight = tl.load(subject + item * w_b + t * w_t, mask=token_ok, other=0).to(tl.float32)[:, None]
    d = _delta(h_rows, u_columns, token_ok, channel_ok, rank_subject, h_r, u_r, BT, BC, R)
    result = tl.load(places, mask=ok, other=0.0).to(tl.float32) + tl.where(weight != 0.0, d * weight, 0.0)
    weight = tl.load(style + item * w_b + t * w_t, mask=token_ok, other=0).to(tl.float32)[:, None]
    h_rows += rank_subject * h_r
    u_columns += rank_subject * u_r
    d = _delta(h_rows, u_columns, token_ok, channel_ok, rank_both - rank_subject, h_r, u_r, BT, BC, R)
    result += tl.where(weight != 0.0, d * weight, 0.0)
    tl.store(places, result.to(y.dtype.element_ty), mask=ok)
