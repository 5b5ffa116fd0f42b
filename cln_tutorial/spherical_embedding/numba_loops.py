"""The CPU with a compiler: Hogwild over documents (extra ``fast``).

Threads write into one table without locks; with one thread all is sequential and reproducible.

The new vectors are sums of old ones whose dot products are known, and so are the norms of the sums:
a triple is two dots, the gate, four more dots, and one pass that writes. The norms of the old
vectors are measured, never taken as 1: the update would hand their errors on, enlarged.

The length of a row is part of the type of the table (:func:`as_records`), hence a constant for the
compiler: 1.1 times the words a second of a length that it does not know.
"""

from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float32

from cln_tutorial.spherical_embedding.objective import FACTORS
from cln_tutorial.spherical_embedding.samplers import REDRAWS

_PROGRAM, _PAPER = FACTORS.index("program"), FACTORS.index("paper")
_ONE, _TWO = np.float32(1), np.float32(2)
_GOLDEN, _HALF, _LOW = np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(0xFFFFFFFF)

# Sums in any order, and no other licence: with "nnan" a vector of NaN would pass the gate.
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
_OPTIONS |= {"fastmath": {"reassoc", "contract", "nsz", "arcp"}}
_compile = numba.njit(**_OPTIONS)
# Left to itself the compiler inlines it in a process that finds the cache, and not in the one that
# fills it, and the last bits of the two differ.
_compile_inline = numba.njit(**_OPTIONS, forceinline=True)


def as_records(vectors: Float32[np.ndarray, "rows dim"]) -> np.ndarray:
    """View rows as records, whose type knows how long they are."""
    return vectors.view([("row", np.float32, (vectors.shape[1],))])[:, 0]


@_compile
@no_type_check
def train_documents(
    table, tokens, starts, documents, keys, seen, total, keep, alias, window, negative, lr, floor,
    margin, factor, joint,
):  # fmt: skip
    """Train on some documents, one after the other, as ``samplers.draw`` and ``update_`` would.

    Args:
        table: records of all words, all contexts and all documents.
        tokens, starts: the corpus.
        documents: numbers of those to visit.
        keys: one for each of them.
        seen: for each of them, tokens that come before it in the whole of training.
        total: tokens of the whole of training.
        keep, alias, window, negative: of the sampler.
        lr, floor: the learning rate at the start, and the lowest.
        margin: float32.
        factor: number of the factor.
        joint: one hinge with both contexts, instead of two.

    Returns:
        How many triples there were, how many moved, and the sum of their hinges.
    """
    words = len(keep)
    triples, active, hinges = 0, 0, 0.0
    longest = 0
    for document in documents:
        longest = max(longest, starts[document + 1] - starts[document])
    stay = np.empty(longest, np.int64)
    for k in range(len(documents)):
        document, start = documents[k], starts[documents[k]]
        count = 0
        for place in range(starts[document + 1] - start):
            bits = _token_key(keys[k], place)
            if (bits >> _HALF) <= np.uint64(keep[tokens[start + place]]):
                stay[count] = place
                count += 1
        for i in range(count):
            word = np.int64(tokens[start + stay[i]])
            bits = _token_key(keys[k], stay[i])
            rate = np.float32(max(floor, lr * (1 - (seen[k] + stay[i]) / total)))
            half_width = np.int64(((bits & _LOW) * np.uint64(window)) >> _HALF) + 1
            last = min(i + half_width, count - 1)
            # First it is the context of its neighbours, then the centre word of its document.
            for j in range(max(i - half_width, 0), last + (1 if joint else 2)):
                if j == i:
                    continue
                is_word = j <= last
                centre = np.int64(tokens[start + stay[j]]) if is_word else word
                context = words + word if is_word else 2 * words + document
                for _ in range(negative):
                    bits += _GOLDEN
                    noise = _noise(bits, alias, centre)
                    if noise < 0:
                        continue
                    triples += 1
                    if joint:
                        hinge = joint_triple(
                            table, centre, context, 2 * words + document, noise, rate, margin,
                            factor,
                        )  # fmt: skip
                    else:
                        hinge = triple(table, centre, context, noise, rate, margin, factor)
                    if hinge > 0:
                        active += 1
                        hinges += hinge
    return triples, active, hinges


@_compile
@no_type_check
def infer_documents(
    results, table, tokens, starts, documents, keys, epochs, keep, alias, negative, lr, floor,
    margin, factor,
):  # fmt: skip
    """Train new documents alone, each as if its tokens stood there ``epochs`` times.

    Args:
        results: records of the documents, at their start.
        table: records of the words, which stay as they are.
        documents: numbers of those to visit.
        keys: one for each document of ``results``.
        epochs: how often each is read.

    The other arguments are those of :func:`train_documents`.
    """
    for document in documents:
        start = starts[document]
        length = starts[document + 1] - start
        for place in range(epochs * length):
            word = np.int64(tokens[start + place % length])
            bits = _token_key(keys[document], place)
            if (bits >> _HALF) > np.uint64(keep[word]):
                continue
            rate = np.float32(max(floor, lr * (1 - place / (epochs * length))))
            for _ in range(negative):
                bits += _GOLDEN
                noise = _noise(bits, alias, word)
                if noise >= 0:
                    _document_alone(results, table, document, word, noise, rate, margin, factor)


@_compile_inline
@no_type_check
def triple(table, centre, context, noise, lr, margin, factor):
    """Move three rows, all read before one is written; return the hinge, zero if it is closed."""
    u, v, n = table[centre]["row"], table[context]["row"], table[noise]["row"]
    f = h = np.float32(0)
    for i in range(len(u)):
        f += v[i] * u[i]
        h += v[i] * n[i]
    if not (f - h < margin):
        return np.float32(0)
    uu = vv = nn = un = np.float32(0)
    for i in range(len(u)):
        uu += u[i] * u[i]
        vv += v[i] * v[i]
        nn += n[i] * n[i]
        un += u[i] * n[i]
    gap, apart = f - h, max(uu + nn - _TWO * un, np.float32(0))
    of_u, of_noise = _centre_factors(f, h, vv, factor)
    a, b, c = lr * of_u, lr * of_noise, lr * _context_factor(gap, apart, factor)
    if centre == noise:  # one row, the sum of both steps, written twice
        a, b = a - b, b - a
    keep_u, keep_n, keep_v = _ONE - a * f, _ONE + b * h, _ONE - c * gap
    scale = _inverse_norm(keep_u, uu, a, f, vv)
    keep_u, a = keep_u * scale, a * scale
    scale = _inverse_norm(keep_n, nn, -b, h, vv)
    keep_n, b = keep_n * scale, b * scale
    scale = _inverse_norm(keep_v, vv, c, gap, apart)
    keep_v, c = keep_v * scale, c * scale
    for i in range(len(u)):
        x, y, z = u[i], v[i], n[i]
        u[i] = keep_u * x + a * y
        n[i] = keep_n * z - b * y
        v[i] = keep_v * y + c * (x - z)
    return margin - gap


@_compile_inline
@no_type_check
def joint_triple(table, centre, context, document, noise, lr, margin, factor):
    """Move four rows of the joint hinge, as :func:`triple` does three."""
    u, v, n = table[centre]["row"], table[context]["row"], table[noise]["row"]
    d = table[document]["row"]
    vu = vn = du = dn = np.float32(0)
    for i in range(len(u)):
        vu += v[i] * u[i]
        vn += v[i] * n[i]
        du += d[i] * u[i]
        dn += d[i] * n[i]
    f, h, v_gap, d_gap = vu + du, vn + dn, vu - vn, du - dn
    if not (f - h < margin):
        return np.float32(0)
    uu = vv = dd = nn = un = vd = np.float32(0)
    for i in range(len(u)):
        uu += u[i] * u[i]
        vv += v[i] * v[i]
        dd += d[i] * d[i]
        nn += n[i] * n[i]
        un += u[i] * n[i]
        vd += v[i] * d[i]
    total = max(vv + dd + _TWO * vd, np.float32(0))
    apart = max(uu + nn - _TWO * un, np.float32(0))
    of_u, of_noise = _centre_factors(f, h, total, factor)
    a, b = lr * of_u, lr * of_noise
    c = lr * _context_factor(v_gap, apart, factor)
    e = lr * _context_factor(d_gap, apart, factor)
    if centre == noise:
        a, b = a - b, b - a
    keep_u, keep_n = _ONE - a * f, _ONE + b * h
    keep_v, keep_d = _ONE - c * v_gap, _ONE - e * d_gap
    scale = _inverse_norm(keep_u, uu, a, f, total)
    keep_u, a = keep_u * scale, a * scale
    scale = _inverse_norm(keep_n, nn, -b, h, total)
    keep_n, b = keep_n * scale, b * scale
    scale = _inverse_norm(keep_v, vv, c, v_gap, apart)
    keep_v, c = keep_v * scale, c * scale
    scale = _inverse_norm(keep_d, dd, e, d_gap, apart)
    keep_d, e = keep_d * scale, e * scale
    for i in range(len(u)):
        x, y, z, w = u[i], v[i], n[i], d[i]
        u[i] = keep_u * x + a * (y + w)
        n[i] = keep_n * z - b * (y + w)
        v[i] = keep_v * y + c * (x - z)
        d[i] = keep_d * w + e * (x - z)
    return margin - (f - h)


@numba.njit(inline="always")
@no_type_check
def _document_alone(results, table, document, word, noise, lr, margin, factor):
    u, d, n = table[word]["row"], results[document]["row"], table[noise]["row"]
    gap = dd = apart = np.float32(0)
    for i in range(len(u)):
        gap += d[i] * (u[i] - n[i])
        dd += d[i] * d[i]
        apart += (u[i] - n[i]) * (u[i] - n[i])
    if gap < margin:
        c = lr * _context_factor(gap, apart, factor)
        keep = _ONE - c * gap
        scale = _inverse_norm(keep, dd, c, gap, apart)
        for i in range(len(u)):
            d[i] = scale * (keep * d[i] + c * (u[i] - n[i]))


@numba.njit(inline="always")
@no_type_check
def _centre_factors(f, h, squared, factor):
    """Factors of the centre word and of the noise word; ``squared`` is the contexts' norm."""
    if factor == _PROGRAM:
        return _ONE - f, _TWO * h
    if factor == _PAPER:
        scale = _ONE / np.sqrt(squared) if squared > 0 else np.float32(0)
        return _ONE - f * scale, _ONE + h * scale
    return _ONE, _ONE


@numba.njit(inline="always")
@no_type_check
def _context_factor(gap, apart, factor):
    if factor == _PROGRAM:
        return _ONE - gap
    if factor == _PAPER:
        return _ONE - gap / np.sqrt(apart) if apart > 0 else _ONE
    return _ONE


@numba.njit(inline="always")
@no_type_check
def _inverse_norm(keep, xx, step, xz, zz):
    """Return 1 over the norm of ``keep x + step z``, of the dot products of x and z."""
    return _ONE / np.sqrt(keep * keep * xx + _TWO * keep * step * xz + step * step * zz)


@numba.njit(inline="always")
@no_type_check
def _noise(bits, alias, forbidden):
    """Draw a noise word that is not the centre word; -1 if all draws fail."""
    for _ in range(REDRAWS):
        bits = _mix(bits)
        column = np.int64(((bits >> _HALF) * np.uint64(len(alias))) >> _HALF)
        drawn = (
            column if (bits & _LOW) <= np.uint64(alias[column, 0]) else np.int64(alias[column, 1])
        )
        if drawn != forbidden:
            return drawn
    return np.int64(-1)


@numba.njit(inline="always")
@no_type_check
def _token_key(key, place):
    return _mix(key + _GOLDEN * np.uint64(place + 1))


# As in ``samplers``; here once more, because the cache of compiled code watches this file alone.
@numba.njit(inline="always")
@no_type_check
def _mix(z):
    z = np.uint64((z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    z = np.uint64((z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(z ^ (z >> np.uint64(31)))
