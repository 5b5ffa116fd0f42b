"""A dictionary that extracts triples without a model."""

from collections import Counter
from collections.abc import Iterator, Sequence

from cln_tutorial.triple_extraction.triples import Example, Triple


class DictionaryBaseline:
    r"""Predict the triples of the training set whose two mentions stand in the sentence.

    A triple :math:`t` is kept if it is right at least half the time in the training sentences that
    have both of its mentions as words:

    .. math:: \frac{\#\{x : t \in T(x)\}}{\#\{x : s, o \in x\}} \ge \frac12

    It cannot find anything new. Where it scores well, the test set repeats the training set; a
    figure of a model says little without it.

    Words are what white space separates, as in the tokenised texts of WebNLG, NYT and CoNLL04; a
    text without blanks is a single word.

    Source:
        The chapter's own; the public figures have no baseline of this kind.

    Example:
        >>> from cln_tutorial.triple_extraction.triples import Example
        >>> train = [Example("Kafka was born in Prague", [("Kafka", "born in", "Prague")])]
        >>> found = DictionaryBaseline().fit(train).predict(["Prague , where Kafka wrote"])
        >>> [triple.key for triple in found[0]]
        [('Kafka', 'born in', 'Prague')]
    """

    def fit(self, examples: Sequence[Example]) -> "DictionaryBaseline":
        """Collect the triples of the examples, and count how often each is right.

        Args:
            examples: sentences with their triples; triples that repeat count once.

        Returns:
            Itself, with ``share_``: ``share_[subject, relation, object]`` is how often a kept
            triple is right.

        Raises:
            TypeError: if an example is none.
        """
        for index, example in enumerate(examples):
            if not isinstance(example, Example):
                raise TypeError(f"`examples[{index}]` must be an Example; got {example!r}.")
        every = {t.key: None for example in examples for t in example.triples}  # keeps the order
        self._by_subject: dict[str, list[tuple[str, str, str]]] = {}
        for key in every:
            self._by_subject.setdefault(key[0], []).append(key)
        self._mention_by_words = {" ".join(m.split()): m for s, _, o in every for m in (s, o)}
        self._prefixes = {
            " ".join(words[:end])
            for words in map(str.split, self._mention_by_words)
            for end in range(1, len(words) + 1)
        }
        offered: Counter[tuple[str, str, str]] = Counter()
        right: Counter[tuple[str, str, str]] = Counter()
        for example in examples:
            truth = {triple.key for triple in example.triples}
            for key in self._candidates(example.text):
                offered[key] += 1
                right[key] += key in truth
        self.share_ = {k: right[k] / n for k, n in offered.items() if 2 * right[k] >= n}
        return self

    def predict(self, texts: Sequence[str]) -> list[list[Triple]]:
        """Return the kept triples whose two mentions stand in each text.

        Args:
            texts: any strings.

        Returns:
            One list per text, of distinct triples without places; ``score`` is how often the triple
            is right in the training set.

        Raises:
            TypeError: if ``texts`` is a string, or one of them is none.
            RuntimeError: if nothing was fitted.
        """
        if not hasattr(self, "share_"):
            raise RuntimeError("the dictionary is empty: call `fit` with examples first.")
        if isinstance(texts, str):
            raise TypeError("`texts` must be a sequence of strings, not a string.")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"`texts[{index}]` must be a string; got {text!r}.")
        return [
            [
                Triple(*key, score=self.share_[key])
                for key in self._candidates(text)
                if key in self.share_
            ]
            for text in texts
        ]

    def _candidates(self, text: str) -> Iterator[tuple[str, str, str]]:
        found = dict.fromkeys(self._mentions(text.split()))
        for subject in found:
            for key in self._by_subject.get(subject, ()):
                if key[2] in found:
                    yield key

    def _mentions(self, words: list[str]) -> Iterator[str]:
        for first in range(len(words)):
            for end in range(first + 1, len(words) + 1):
                piece = " ".join(words[first:end])
                if piece not in self._prefixes:
                    break
                if piece in self._mention_by_words:
                    yield self._mention_by_words[piece]
