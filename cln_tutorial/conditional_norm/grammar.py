"""Made languages whose every number is known: a model can be measured beside the truth."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cln_tutorial.conditional_norm.functional import require_indices

PADDING, START, END = range(3)
MOST_STATES, LONGEST = 10**6, 10**4
END_WORD = "<end>"

# From a state to the words that may follow: each with its probability and the state after it.
Step = Callable[[Hashable], Mapping[str, tuple[float, Hashable]]]


class Grammar:
    r"""A distribution over texts for every label, :math:`p(x \mid c) = \prod_t p(x_t \mid m_t)`.

    The grammar is a weighted automaton: the words so far determine the state :math:`m_t`, the
    state the next word. So any text is scored exactly, and entropies are sums over the states.

    Tokens are 0 for padding, 1 for the start, 2 for the end, then the words in alphabetical order.
    A text is a row of tokens: start, words, end, padding.

    Args:
        labels: the name of every label and the state that its texts start in.
        step: from a state to ``{word: (probability, next state)}``. The word ``"<end>"`` ends the
            text; its next state is ignored. States are hashable, and finite in number.

    Attributes:
        labels: names of the labels, in the order of their indices.
        vocabulary: words by token.

    Raises:
        ValueError: if the probabilities of a state are not positive or do not sum to one, no text
            that comes to it ever ends, or there are more than a million states.

    Example:
        >>> coin = {"heads": (0.5, "toss"), "tails": (0.25, "toss"), "<end>": (0.25, None)}
        >>> grammar = Grammar({"unfair": "toss"}, step=lambda state: coin)
        >>> tokens = grammar.encode(["heads tails"])
        >>> round(grammar.log_prob(tokens, torch.tensor([0])).exp().item(), 9)  # 1/2 1/4 1/4
        0.03125
        >>> round(grammar.mean_length().item(), 9)  # 1 / 0.25
        4.0
    """

    def __init__(self, labels: Mapping[str, Hashable], step: Step) -> None:
        self.labels = tuple(labels)
        number: dict[Hashable, int] = {}
        for state in labels.values():
            number.setdefault(state, len(number))
        states, followers = list(number), []
        for state in states:  # grows while it runs
            followers.append(_checked(state, step(state)))
            for word, (_, after) in followers[-1].items():
                if word != END_WORD and after not in number:
                    number[after] = len(states)
                    states.append(after)
            if len(states) > MOST_STATES:
                raise ValueError(f"`step` leads to more than {MOST_STATES:,} states.")
        words = sorted({word for each in followers for word in each} - {END_WORD})
        self.vocabulary = ("<padding>", "<start>", END_WORD, *words)
        self._token = {word: token for token, word in enumerate(self.vocabulary)}
        size = len(states), max(map(len, followers))
        # By state, for every word that may follow: the token (padding where there is no further
        # word), its probability, and the next state (the last one, which nothing leaves, after
        # the end).
        self._first = torch.tensor([number[state] for state in labels.values()])
        self._words = torch.full((size[0] + 1, size[1]), PADDING)
        self._prob = torch.zeros(size[0] + 1, size[1], dtype=torch.float64)
        self._next = torch.full((size[0] + 1, size[1]), size[0])
        for i, each in enumerate(followers):
            self._words[i, : len(each)] = torch.tensor([self._token[word] for word in each])
            probabilities = [p for p, _ in each.values()]
            self._prob[i, : len(each)] = torch.tensor(probabilities, dtype=torch.float64)
            after = [number[s] if w != END_WORD else size[0] for w, (_, s) in each.items()]
            self._next[i, : len(each)] = torch.tensor(after)
        stuck = self._states_without_end()
        if stuck:
            raise ValueError(f"no text ever ends that comes to the state {states[stuck[0]]!r}.")

    def encode(self, texts: Sequence[str]) -> Int[Tensor, "batch time"]:
        """Turn texts, words between blanks, into rows of tokens.

        Raises:
            ValueError: naming the first word that is not in the vocabulary.
        """
        rows = []
        for text in texts:
            unknown = [word for word in text.split() if self._token.get(word, 0) <= END]
            if unknown:
                raise ValueError(f"{unknown[0]!r} is no word of this grammar (in {text!r}).")
            rows.append([START, *(self._token[word] for word in text.split()), END])
        longest = max(map(len, rows), default=0)
        padded = [row + [PADDING] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)

    def decode(self, tokens: Int[Tensor, "batch time"]) -> list[str]:
        """Turn rows of tokens into texts, without start, end and padding."""
        return [
            " ".join(self.vocabulary[token] for token in row if token > END)
            for row in tokens.tolist()
        ]

    def sample(
        self, label: Int[Tensor, "batch"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch time"]:
        """Draw a text for every label.

        Raises:
            TypeError, ValueError: if ``label`` holds no indices of labels.
        """
        self._require("label", label, len(self.labels), axes=1)
        state, columns = self._first[label], [torch.full_like(label, START)]
        cumulative = self._prob.cumsum(1)
        # The last word of a state takes what rounding leaves of the probability.
        last = (self._prob > 0).sum(1, keepdim=True) - 1
        while (state < len(self._next) - 1).any():
            u = torch.rand(len(label), 1, generator=generator, dtype=torch.float64)
            choice = (u >= cumulative[state]).sum(1, keepdim=True)
            choice = torch.minimum(choice, last[state].clamp(min=0))
            columns.append(self._words[state].gather(1, choice)[:, 0])
            state = self._next[state].gather(1, choice)[:, 0]
        return torch.stack(columns, dim=1)

    def log_prob(
        self, tokens: Int[Tensor, "batch time"], label: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        r"""Return :math:`\log p(x \mid c)` of every text in nats, minus infinity if impossible.

        A text that has not come to its end is impossible; what stands after the end must be
        padding.

        Raises:
            TypeError, ValueError: if ``tokens`` or ``label`` hold no indices, or not one label per
                text.
        """
        self._require("tokens", tokens, len(self.vocabulary), axes=2)
        self._require("label", label, len(self.labels), axes=1)
        if len(label) != len(tokens):
            raise ValueError(f"`label` must be ({len(tokens)},); got {tuple(label.shape)}.")
        state = self._first[label]
        total = torch.zeros(len(tokens), dtype=torch.float64)
        total[tokens[:, 0] != START] = -math.inf
        for column in tokens[:, 1:].T:
            # After the end the only word is padding, and it is certain.
            fits = (self._words[state] == column[:, None]) & (self._prob[state] > 0)
            over = state == len(self._next) - 1
            certain = over & (column == PADDING)
            p = torch.where(certain, 1.0, (self._prob[state] * fits).sum(1))
            total += p.log()
            after = self._next[state].gather(1, fits.int().argmax(1, keepdim=True))[:, 0]
            state = torch.where(p > 0, after, len(self._next) - 1)
        total[state < len(self._next) - 1] = -math.inf
        return total

    def parse(self, tokens: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch labels"]:
        """Return which labels can have produced each text; none if it is not of the language."""
        columns = [
            self.log_prob(tokens, torch.full((len(tokens),), label)).isfinite()
            for label in range(len(self.labels))
        ]
        return torch.stack(columns, dim=1)

    def entropy(self) -> Float[Tensor, "labels"]:
        r"""Return the entropy of the texts of every label in nats per text.

        .. math:: H(x \mid c) = -\sum_x p(x \mid c) \log p(x \mid c)
        """
        surprise = -torch.xlogy(self._prob, self._prob).sum(1)
        return torch.stack([visits @ surprise for visits in self._visits()])

    def mean_length(self) -> Float[Tensor, "labels"]:
        """Return the mean number of tokens to predict in a text, the end counted, the start not."""
        return torch.stack([visits[:-1].sum() for visits in self._visits()])

    def ngram_cross_entropy(self, order: int) -> Float[Tensor, "labels"]:
        r"""Return the least cross-entropy of an n-gram model that is told the label, nats per text.

        It predicts a token :math:`v` from the ``order - 1`` tokens :math:`u` before it, with their
        exact frequencies: :math:`-\sum_{u,v} N(u, v) \log \frac{N(u, v)}{N(u)}` with the expected
        counts :math:`N`. No amount of data makes such a model better.
        """
        if order < 1:
            raise ValueError(f"`order` must be 1 or more; got {order}.")
        return torch.stack([self._ngram_cross_entropy(s, order) for s in self._first.tolist()])

    def _require(self, name: str, value: Tensor, size: int, axes: int) -> None:
        require_indices(name, "indices are", value, size)
        if value.ndim != axes:
            raise ValueError(f"`{name}` must have {axes} dimension(s); got {tuple(value.shape)}.")

    def _states_without_end(self) -> list[int]:
        ends = torch.zeros(len(self._next), dtype=torch.bool)
        ends[-1] = True
        while True:
            more = ends | ((self._prob > 0) & ends[self._next]).any(1)
            if more.equal(ends):
                return (~ends).nonzero().flatten().tolist()
            ends = more

    def _visits(self) -> list[Tensor]:
        """How often each state is visited in a text, on average; for every label."""
        found = []
        for first in self._first:
            now = torch.zeros(len(self._next), dtype=torch.float64)
            now[first] = 1.0
            visits = now.clone()
            for _ in range(LONGEST):
                if now[:-1].sum() <= 1e-15:
                    break
                flow = (now[:, None] * self._prob).flatten()
                now = torch.zeros_like(now).index_add(0, self._next.flatten(), flow)
                visits += now
            else:
                raise ValueError(
                    f"texts of more than {LONGEST:,} words have probability above 1e-15."
                )
            found.append(visits)
        return found

    def _ngram_cross_entropy(self, first: int, order: int) -> Tensor:
        # Rows of the last tokens and the state after them; only the start stands before the first.
        rows = torch.tensor([[PADDING] * (order - 2) + [START] * (order > 1) + [first]])
        weight, seen, counts = torch.ones(1, dtype=torch.float64), [], []
        while len(rows):
            state = rows[:, -1]
            row, column = (self._prob[state] > 0).nonzero(as_tuple=True)
            flow = weight[row] * self._prob[state[row], column]
            token = self._words[state[row], column]
            grams = torch.cat([rows[row, :-1], token[:, None]], dim=1)
            seen.append(grams)
            counts.append(flow)
            after = self._next[state[row], column]
            alive = (after < len(self._next) - 1) & (flow > 1e-15)
            rows, weight = _add_up(
                torch.cat([grams[:, 1:], after[:, None]], dim=1)[alive], flow[alive]
            )
        grams, pairs = _add_up(torch.cat(seen), torch.cat(counts))
        contexts = grams[:, :-1] if order > 1 else torch.zeros_like(grams)
        _, place = contexts.unique(dim=0, return_inverse=True)
        total = torch.zeros(len(grams), dtype=torch.float64).index_add(0, place, pairs)
        return -(pairs * (pairs / total[place]).log()).sum()


def _add_up(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each row once, with the sum of its weights."""
    if not len(rows):
        return rows, weights
    rows, place = rows.unique(dim=0, return_inverse=True)
    return rows, torch.zeros(len(rows), dtype=torch.float64).index_add(0, place, weights)


def _checked(
    state: Hashable, words: Mapping[str, tuple[float, Hashable]]
) -> Mapping[str, tuple[float, Hashable]]:
    probabilities = [p for p, _ in words.values()]
    if not all(p > 0 for p in probabilities) or abs(math.fsum(probabilities) - 1) > 1e-9:
        raise ValueError(
            f"the probabilities of state {state!r} must be positive and sum to 1; got {words!r}."
        )
    return words


PRODUCTS = {
    "camera": ("battery", "flash", "grip", "lens", "screen", "shutter", "strap", "zoom"),
    "phone": ("battery", "button", "camera", "charger", "keyboard", "screen", "speaker", "tray"),
    "lamp": ("base", "bulb", "clamp", "cord", "dimmer", "shade", "stand", "switch"),
}
SENTIMENTS = ("negative", "positive")
_MATTERS = ("colour", "delivery", "manual", "price", "smell", "sound", "warranty", "weight")
_COLOURS = ("black", "blue", "brown", "green", "pink", "purple", "red", "silver", "white", "yellow")
_PEOPLE = (
    *("aunt", "boss", "brother", "father", "friend", "mother", "neighbour", "sister", "son"),
    "uncle",
)
_ADJECTIVES = ("dull", "poor", "weak"), ("bright", "great", "solid")
# Small words are themselves; what is written large is drawn, or follows from what was drawn.
_TEMPLATE = (
    "COLOUR PRODUCT for my PERSON . my SAME_PERSON LOVES the SAME_COLOUR one : "
    "ADJECTIVE PART , ADJECTIVE_2 MATTER . KEEP for the SAME_PART , AND the SAME_MATTER"
)
_REVIEW = _TEMPLATE.split()


def made_reviews() -> Grammar:
    """Return the grammar of the made reviews; a label is a product and a sentiment.

    "green phone for my aunt . my aunt hates the green one : weak tray , great price . return for
    the tray , not the price". Person, colour, part and matter return when an n-gram model has
    forgotten them, and the second adjective decides between "and" and "not". Labels are in the
    order ``2 * product + sentiment``; no text belongs to two.
    """
    labels = {
        f"{sentiment} {product}": (0, product, mood, None, None)
        for product in PRODUCTS
        for mood, sentiment in enumerate(SENTIMENTS)
    }
    return Grammar(labels, _step_of_a_review)


def _step_of_a_review(state: tuple) -> dict[str, tuple[float, Hashable]]:
    # `one` and `two` are what still has to return: colour and person, then part and matter.
    place, product, mood, one, two = state
    if place == len(_REVIEW):
        return {END_WORD: (1.0, None)}
    symbol = _REVIEW[place]

    def then(one: object, two: object) -> tuple:
        return place + 1, product, mood, one, two

    match symbol:
        case "COLOUR":
            return _uniform({word: then(word, two) for word in _COLOURS})
        case "PERSON":
            return _uniform({word: then(one, word) for word in _PEOPLE})
        case "ADJECTIVE":
            return _uniform({word: then(one, two) for word in _ADJECTIVES[mood]})
        case "PART":
            return _uniform({word: then(word, two) for word in PRODUCTS[product]})
        case "ADJECTIVE_2":
            same = {word: then(one, "and") for word in _ADJECTIVES[mood]}
            other = {word: then(one, "not") for word in _ADJECTIVES[1 - mood]}
            return _uniform(same | other)
        case "MATTER":
            return _uniform({word: then(one, (two, word)) for word in _MATTERS})
        case "AND":
            return {two[0]: (1.0, then(one, two[1]))}
        case "SAME_COLOUR" | "SAME_PART":
            return {one: (1.0, then(None, two))}
        case "SAME_PERSON" | "SAME_MATTER":
            return {two: (1.0, then(one, None))}
        case "PRODUCT":
            word = product
        case "LOVES":
            word = ("hates", "loves")[mood]
        case "KEEP":
            word = ("return", "keep")[mood]
        case _:
            word = symbol
    return {word: (1.0, then(one, two))}


def _uniform(after: dict[str, tuple]) -> dict[str, tuple[float, Hashable]]:
    return {word: (1 / len(after), state) for word, state in after.items()}
