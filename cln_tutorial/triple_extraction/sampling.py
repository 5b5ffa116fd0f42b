"""How article 7161 chooses the one subject of a sentence that it trains on, as a law.

A start is drawn uniformly among the starts of the gold subjects, then an end uniformly among the
gold ends that do not lie before it. The two need not belong together, on purpose: a pair that is no
subject has no objects, and teaches the object tagger to say so.
"""

from collections.abc import Collection, Iterable

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from cln_tutorial.triple_extraction.alignment import locate
from cln_tutorial.triple_extraction.triples import Example, Span


def article_negative_rate(k: int) -> float:
    r"""Return how often the article draws a pair that is no subject, :math:`1 - H_k / k`.

    Of :math:`k` subjects that do not touch each other, the one that is :math:`i`-th in the text has
    :math:`k - i + 1` ends to choose from, so :math:`P(\text{subject}) = \frac1k \sum_i
    \frac1{k-i+1} = \frac{H_k}k`.

    Args:
        k: number of subjects.

    Raises:
        ValueError: if there is none.

    Source:
        The sampling of article 7161's code; the rate is derived here.

    Example:
        >>> from cln_tutorial.triple_extraction.sampling import article_negative_rate
        >>> [round(article_negative_rate(k), 4) for k in (1, 2, 3, 4)]
        [0.0, 0.25, 0.3889, 0.4792]
    """
    return 1 - article_subject_distribution(k).sum().item()


def article_subject_distribution(k: int) -> Float64[Tensor, " k"]:
    r"""Return how often the article draws each subject, :math:`p_i = \frac1k \frac1{k-i+1}`.

    The last subject is trained :math:`k` times as often as the first. The rest of the sum is for
    the pairs that are no subject.

    Args:
        k: number of subjects that do not touch each other, in the order of the text.

    Returns:
        Probabilities, ``(k,)``, in float64.

    Raises:
        ValueError: if there is none.

    Source:
        The sampling of article 7161's code; the law is derived here.

    Example:
        >>> from cln_tutorial.triple_extraction.sampling import article_subject_distribution
        >>> article_subject_distribution(2)
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}.")
    return 1 / (k * torch.arange(k, 0, -1, dtype=torch.float64))


def article_pair_distribution(subjects: Collection[Span]) -> dict[Span, float]:
    r"""Return the probability of every pair that the article may draw, subject or not.

    :math:`P(s, e) = \frac1k \sum_{i: s_i = s} \frac{\#\{j: e_j = e\}}{\#\{j: e_j \ge s\}}` for a
    sentence of any subjects, nested ones among them.

    Args:
        subjects: the spans of a sentence's subjects, each once, with their last token (or
            character) included.

    Returns:
        From ``(start, end)`` to its probability.

    Source:
        The sampling of article 7161's code.

    Example:
        >>> from cln_tutorial.triple_extraction.sampling import article_pair_distribution
        >>> article_pair_distribution([(0, 1), (5, 5)])
        {(0, 1): 0.25, (0, 5): 0.25, (5, 5): 0.5}
    """
    chance: dict[Span, float] = {}
    for start, _ in subjects:
        ends = [end for _, end in subjects if end >= start]
        for end in ends:
            pair = start, end
            chance[pair] = chance.get(pair, 0.0) + 1 / (len(subjects) * len(ends))
    return chance


def draw_article_subject(
    starts: Int[Tensor, " k"],
    ends: Int[Tensor, " k"],
    generator: torch.Generator | None = None,
    n: int = 1,
) -> Int[Tensor, "n 2"]:
    """Draw as the article does: any start, then any end that is not before it.

    Args:
        starts, ends: of the gold subjects, ``(k,)``, the end included.
        generator: of the device of the starts; the global one if there is none.
        n: number of draws.

    Returns:
        Pairs of a start and an end, ``(n, 2)``.

    Raises:
        ValueError: if there is no subject, or one ends before it starts.

    Source:
        Article 7161; the code's comment says that the mismatch is meant.

    Example:
        >>> from cln_tutorial.triple_extraction.sampling import draw_article_subject
        >>> draw_article_subject(torch.tensor([3]), torch.tensor([4]))
        tensor([[3, 4]])
    """
    k = len(starts)
    if not k or bool((ends < starts).any()):
        raise ValueError(
            f"`starts` and `ends` must be of subjects, at least one, that end where they start or "
            f"later; got {starts.tolist()} and {ends.tolist()}."
        )
    start = starts[torch.randint(k, (n,), generator=generator, device=starts.device)]
    ordered = ends.sort().values
    allowed = k - torch.searchsorted(ordered, start)  # the last ones, in order
    uniform = torch.rand(n, generator=generator, dtype=torch.float64, device=starts.device)
    end = ordered[k - 1 - (uniform * allowed).long()]
    return torch.stack([start, end], dim=1)


def expected_negative_rate(examples: Iterable[Example]) -> float:
    """Return the exact share of sentences whose draw is no subject, without drawing.

    Args:
        examples: sentences with their triples. A subject without a span stands at its first
            occurrence, where the article looks for it. Sentences without subject count for nothing,
            as the article leaves them out.

    Returns:
        The mean over the sentences.

    Raises:
        ValueError: if no sentence has a subject.

    Source:
        The sampling of article 7161's code.

    Example:
        >>> from cln_tutorial.triple_extraction.sampling import expected_negative_rate
        >>> from cln_tutorial.triple_extraction.triples import Example
        >>> triples = [("Ada", "wrote to", "Bea"), ("Cleo", "wrote to", "Bea")]
        >>> expected_negative_rate([Example("Ada and Cleo wrote to Bea.", triples)])
        0.25
    """
    rates = []
    for example in examples:
        subjects = {
            (start, end - 1)
            for triple in example.triples
            for start, end in (
                [triple.subject_span]
                if triple.subject_span
                else locate(example.text, triple.subject, occurrence="first")
            )
        }
        if subjects:
            chance = article_pair_distribution(subjects)
            rates.append(sum(p for pair, p in chance.items() if pair not in subjects))
    if not rates:
        raise ValueError("`examples` must have a sentence with a subject; got none.")
    return sum(rates) / len(rates)
