r"""What chance decides: the words that stay, the width of a window, the noise words, the order.

All random numbers but the order are hashes: of the seed, the epoch and the document comes a key, of
the key and the place in the document comes another, and of that one 64 bits for each question. So a
document meets the same noise on every backend, on any thread, and in a run that was killed and goes
on. The hash is that of SplitMix64, whose state is a counter.

Source: the word2vec program for the two rules; Vose 1991 for the alias table; Steele, Lea & Flood
2014 for SplitMix64, with Stafford's mix 13.
"""

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Integer, UInt32, UInt64

REDRAWS = 16  # draws of a noise word until it is not the centre word; then the triple is left out
_ORDER = 7063  # the article
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_START, INFERENCE = 2**63, 2**63 + 1  # as epochs, of vectors before training and of new documents


def keep_probabilities(
    counts: Integer[np.ndarray, "words"], sample: float | int
) -> Float64[np.ndarray, "words"]:
    r"""Return with which probability a token of each word takes part in an epoch.

    .. math:: \min\Bigl(1, \Bigl(\sqrt{\frac{c}{sT}} + 1\Bigr)\frac{sT}{c}\Bigr), \quad T = \sum c

    This is the rule of the word2vec program; its paper has :math:`1-\sqrt{t/f}` instead, for the
    probability to leave.

    Args:
        counts: how often each word occurs, at least once.
        sample: :math:`s`; 0 keeps all tokens.

    Source: the word2vec program, Mikolov et al. 2013.

    Example:
        >>> keep_probabilities(np.array([900, 90, 10]), sample=0.01).round(3)
        array([0.117, 0.444, 1.   ])
    """
    if sample == 0:
        return np.ones(len(counts))
    share = sample * counts.sum() / counts
    return np.minimum(1, np.sqrt(share) + share)


def noise_distribution(
    counts: Integer[np.ndarray, "words"], exponent: float | int
) -> Float64[np.ndarray, "words"]:
    r"""Return the probabilities of noise words: :math:`p_w \propto c_w^\alpha`.

    Args:
        counts: how often each word occurs.
        exponent: :math:`\alpha`; 1 is the distribution of the corpus, 0 the uniform one.

    Source: Mikolov et al. 2013, with 0.75.

    Example:
        >>> noise_distribution(np.array([16, 1]), 0.75).round(3)
        array([0.889, 0.111])
    """
    weights = counts.astype(np.float64) ** exponent
    return weights / weights.sum()


def alias_table(
    probabilities: Float64[np.ndarray, "words"],
) -> UInt32[np.ndarray, "words 2"]:
    r"""Prepare draws from a discrete distribution at two memory reads each, in 8 bytes a word.

    A draw picks a column at random; with 32 random bits up to the column's first number it is that
    word, else the word of the second number.

    Args:
        probabilities: they sum to 1.

    Returns:
        One row for each word.

    Source: Walker 1977; Vose 1991 for the construction in linear time.

    Example:
        >>> alias_table(np.array([0.75, 0.25])) / [2**32 - 1, 1]  # half of column 1 is word 0
        array([[1. , 0. ],
               [0.5, 0. ]])
    """
    heights = (probabilities * len(probabilities)).tolist()
    alias = list(range(len(heights)))
    low = [word for word, height in enumerate(heights) if height < 1]
    high = [word for word, height in enumerate(heights) if height >= 1]
    while low and high:
        poor, rich = low.pop(), high[-1]
        alias[poor] = rich
        heights[rich] -= 1 - heights[poor]
        if heights[rich] < 1:
            low.append(high.pop())
    for word in low + high:  # what is left differs from 1 by rounding alone
        heights[word] = 1.0
    return np.stack([_limits(np.array(heights)), np.array(alias, np.uint32)], 1)


@dataclass(frozen=True, eq=False)
class Sampler:
    """The chances of one corpus and one setting, as tables of integers.

    Attributes:
        keep: a token stays if its 32 bits are not larger.
        alias: the noise words, as of :func:`alias_table`.
        window: the largest half-width; 0 leaves out the words' pairs.
        negative: noise words for each pair.
        seed: of all hashes.
    """

    keep: UInt32[np.ndarray, "words"]
    alias: UInt32[np.ndarray, "words 2"]
    window: int
    negative: int
    seed: int

    @classmethod
    def of(
        cls,
        counts: Integer[np.ndarray, "words"],
        *,
        sample: float | int,
        ns_exponent: float | int,
        window: int,
        negative: int,
        seed: int,
    ) -> "Sampler":
        """Make the tables of the counts of a vocabulary."""
        return cls(
            keep=_limits(keep_probabilities(counts, sample)),
            alias=alias_table(noise_distribution(counts, ns_exponent)),
            window=window,
            negative=negative,
            seed=seed,
        )


def document_order(documents: int, seed: int, epoch: int) -> Int64[np.ndarray, "documents"]:
    """Shuffle the documents for one epoch.

    Example:
        >>> document_order(5, seed=0, epoch=0), document_order(5, seed=0, epoch=1)
        (array([0, 2, 1, 4, 3]), array([1, 2, 4, 3, 0]))
    """
    # Without a constant of ours the first order would be that of `default_rng(seed)`, by which a
    # user may have split the data.
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(documents)


def document_keys(
    seed: int, epoch: int, documents: Integer[np.ndarray, "documents"]
) -> UInt64[np.ndarray, "documents"]:
    """Return the key of each document in one epoch, a hash of the three numbers."""
    key = np.zeros(len(documents), np.uint64)
    for part in (np.uint64(seed), np.uint64(epoch), documents.astype(np.uint64)):
        key = _mix((key ^ part) + _GOLDEN)
    return key


def token_hashes(
    tokens: Int32[np.ndarray, "tokens"], starts: Int64[np.ndarray, "borders"]
) -> UInt64[np.ndarray, "documents"]:
    """Return one number for each document that depends on its tokens and their order alone.

    Args:
        tokens: of all documents, one after the other.
        starts: where each document starts, and where the last one ends.
    """
    place = np.arange(len(tokens)) - np.repeat(starts[:-1], np.diff(starts))
    mixed = _mix(_mix(tokens.astype(np.uint64) + _GOLDEN) + _GOLDEN * (place + 1).astype(np.uint64))
    total = np.concatenate([np.zeros(1, np.uint64), mixed.cumsum(dtype=np.uint64)])
    return total[starts[1:]] - total[starts[:-1]]


def unit_rows(keys: UInt64[np.ndarray, "rows"], dim: int) -> Float32[np.ndarray, "rows dim"]:
    """Return a direction for each key, nearly uniform on the sphere.

    Each entry is the sum of four 16-bit numbers, close to a normal one. The norm is that of
    integers, so that no entry depends on how many rows there are.
    """
    bits = _mix(keys[:, None] + _GOLDEN * np.arange(1, dim + 1, dtype=np.uint64))
    entries = bits.view(np.uint16).reshape(len(keys), dim, 4).sum(-1, dtype=np.int64)
    entries = 2 * entries - 4 * (2**16 - 1)  # odd or even, the mean is zero
    entries[:, 0] += (entries == 0).all(-1)
    squares = np.square(entries).sum(-1, keepdims=True)
    return (entries / np.sqrt(squares)).astype(np.float32)


def start_keys(seed: int, rows: Integer[np.ndarray, "rows"]) -> UInt64[np.ndarray, "rows"]:
    """Return the keys of rows before training, for :func:`unit_rows`."""
    return document_keys(seed, _START, rows)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The triples of some documents, in the order of training.

    Attributes:
        centre: word of the first table.
        context: the token's word, of the second table, or -1 where the document is the context.
        noise: word of the first table, never the centre word.
        document: position among the given documents.
        place: of the token in its document, before words were left out.
    """

    centre: Int64[np.ndarray, "triples"]
    context: Int64[np.ndarray, "triples"]
    noise: Int64[np.ndarray, "triples"]
    document: Int64[np.ndarray, "triples"]
    place: Int64[np.ndarray, "triples"]


def draw(
    sampler: Sampler,
    tokens: Int32[np.ndarray, "tokens"],
    lengths: Int64[np.ndarray, "documents"],
    keys: UInt64[np.ndarray, "documents"],
) -> Pairs:
    """Draw the triples of one epoch, as the compiled loop does.

    A token that stays is the context of all its neighbours, one after the other, and then the
    centre word of its document. The program does so too, and it matters: with the roles exchanged,
    documents in a fixed order come out with worse clusters. Each pair has ``negative`` noise words.
    The program only makes sure that they are not the *context* word; here they are not the centre
    word, which would be pushed both ways, and are drawn again instead of being left out.

    Args:
        sampler: the chances.
        tokens: of the documents, one after the other.
        lengths: how many tokens each document has.
        keys: one for each document, of :func:`document_keys`.
    """
    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) - np.repeat(lengths.cumsum() - lengths, lengths)
    token_keys = _mix(keys[document] + _GOLDEN * (place + 1).astype(np.uint64))
    stays = (token_keys >> _HALF) <= sampler.keep[tokens]
    word, document, place = tokens[stays].astype(np.int64), document[stays], place[stays]
    token_keys = token_keys[stays]

    token = np.arange(len(word))
    half_width = half_widths(token_keys, sampler.window) if sampler.window else 0
    stop = np.bincount(document, minlength=len(lengths)).cumsum()
    start = np.concatenate([[0], stop[:-1]])
    first = np.maximum(token - half_width, start[document])
    last = np.minimum(token + half_width, stop[document] - 1)
    neighbours = last - first

    slots = (neighbours + 1) * sampler.negative
    owner = np.repeat(token, slots)
    slot = np.arange(len(owner)) - np.repeat(slots.cumsum() - slots, slots)
    pair = slot // sampler.negative
    is_word = pair < neighbours[owner]
    neighbour = first[owner] + pair
    neighbour += neighbour >= owner
    centre = word[np.where(is_word, neighbour, owner)]
    noise = noise_words(sampler, token_keys[owner] + _GOLDEN * (slot + 1).astype(np.uint64), centre)
    columns = centre, np.where(is_word, word[owner], -1), noise, document[owner], place[owner]
    return Pairs(*(column[noise >= 0] for column in columns))


def half_widths(
    token_keys: UInt64[np.ndarray, "tokens"], window: int
) -> Int64[np.ndarray, "tokens"]:
    """Return half-widths of windows, uniform on 1 to ``window``, of the lower bits of the keys."""
    return (((token_keys & _LOW) * np.uint64(window)) >> _HALF).astype(np.int64) + 1


def noise_words(
    sampler: Sampler,
    keys: UInt64[np.ndarray, "draws"],
    forbidden: Int64[np.ndarray, "draws"],
) -> Int64[np.ndarray, "draws"]:
    """Draw one noise word per key, none of them forbidden; -1 where all draws failed."""
    noise = np.full(len(keys), -1)
    left = np.arange(len(keys))
    for _ in range(REDRAWS):
        keys = _mix(keys)
        column = (((keys >> _HALF) * np.uint64(len(sampler.alias))) >> _HALF).astype(np.int64)
        limit, other = sampler.alias[column].T
        drawn = np.where((keys & _LOW) <= limit, column, other)
        allowed = drawn != forbidden[left]
        noise[left[allowed]] = drawn[allowed]
        left, keys = left[~allowed], keys[~allowed]
    return noise


def _limits(probabilities: Float64[np.ndarray, "words"]) -> UInt32[np.ndarray, "words"]:
    """Return the largest of 32 bits that still count, so that 1 admits all of them."""
    return np.clip(np.rint(probabilities * 2**32) - 1, 0, 2**32 - 1).astype(np.uint32)


@no_type_check  # it is the innermost step, and takes any shape
def _mix(z):
    """Hash 64 bits to 64 bits, one to one."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
