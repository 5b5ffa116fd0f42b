r"""JoSE as a scikit-learn estimator: fit documents, embed new ones, ask for neighbours.

.. math:: \ell = [m - v^\top u + v^\top u']_+ + [m - d^\top u + d^\top u'']_+, \qquad
    \|u\| = \|v\| = \|d\| = 1

Source: article 7063; Meng et al. 2019 (arXiv 1911.01196), and the program that they released.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted

from cln_tutorial.spherical_embedding.corpus import (
    Corpus,
    Documents,
    Tokenizer,
    Vocabulary,
    encode,
    read_corpus,
)
from cln_tutorial.spherical_embedding.files import (
    read_model,
    read_word2vec,
    write_model,
    write_word2vec,
)
from cln_tutorial.spherical_embedding.settings import Settings
from cln_tutorial.spherical_embedding.training import (
    EpochRecord,
    Tables,
    infer,
    new_tables,
    train,
)

SPACES = ("word", "doc", "word->doc", "doc->word")
UNKNOWN = ("zero", "nan", "error")
_TABLES = {"word": "word_vectors_", "context": "context_vectors_", "doc": "doc_vectors_"}


class SphericalEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Unit vectors of words and documents.

    Args:
        dim: length of the vectors. The margin should go with :math:`1/\sqrt{D}`.
        window: largest half-width of a window, in words that stay.
        negative: noise words for each pair.
        margin: :math:`m`, more than 0 and less than 4.
        lr: learning rate at the start; it falls linearly over all epochs.
        min_lr_ratio: below this share of ``lr`` it does not fall.
        sample: threshold of subsampling of frequent words; 0 keeps all.
        ns_exponent: exponent of the noise distribution.
        min_count: rarer words are left out.
        epochs: how often the corpus is read.
        objective: "two_hinge", the program's, or "joint", the paper's, which needs another factor.
        factor: of a step, "program", "paper" or "none"; see :func:`.jose_step`.
        shuffle: read the documents in another order in each epoch. Without it the order of the
            file leaks into their vectors.
        max_vocab: keep at most so many words, the most frequent ones.
        tokenizer: makes words of a string. By default they end at white space, so that punctuation
            sticks to them.
        lowercase: turn everything to lower case.
        n_jobs: threads of backend "numba", -1 for one per core. With more than one the result is
            not reproducible.
        backend: "numba", the first fit of a ``dim`` compiling for some seconds; "torch", many times
            slower, in steps of ``batch_size`` triples; or "auto", numba where it is installed.
        batch_size, device: of backend "torch".
        infer_epochs: how often :meth:`transform` reads a document.
        unknown: what :meth:`transform` gives a document without a known word: a row of "zero" or
            "nan", or an "error".
        random_state: of all random numbers.
        cache_dir: a folder for the tokens, for a corpus that is larger than memory.
        checkpoint: a folder. All is saved there after each epoch, and a ``fit`` that was killed
            continues there; with one thread to the same result, bit for bit.
        callbacks: functions that get the :class:`.EpochRecord` after each epoch.
        verbose: show bars.

    Attributes:
        vocabulary_: number of each word.
        index_to_word_: the words, the most frequent first.
        counts_: how often each occurs.
        word_vectors_: of the words as centres, ``(words, dim)``, float32, of length 1.
        context_vectors_: of the words as contexts.
        doc_vectors_: of the documents.
        empty_documents_: numbers of the documents without a word; they keep their random start.
        history_: one :class:`.EpochRecord` per epoch.
        n_iter_: number of epochs.
        seed_: what ``random_state`` came to.

    Source:
        Article 7063; Meng et al. 2019.

    Example:
        >>> docs = [["sun", "moon"], ["salt", "bread"]] * 50
        >>> jose = SphericalEmbedding(dim=10, min_count=1, sample=0, random_state=0).fit(docs)
        >>> jose.most_similar("sun", topn=1)[0][0]
        'moon'
        >>> jose.transform([["bread"]]).shape
        (1, 10)
    """

    def __init__(
        self,
        dim: int = 100,
        *,
        window: int = 10,
        negative: int = 2,
        margin: float | int = 0.15,
        lr: float | int = 0.04,
        min_lr_ratio: float | int = 1e-4,
        sample: float | int = 1e-3,
        ns_exponent: float | int = 0.75,
        min_count: int = 5,
        epochs: int = 10,
        objective: str = "two_hinge",
        factor: str = "program",
        shuffle: bool = True,
        max_vocab: int | None = None,
        tokenizer: Tokenizer | None = None,
        lowercase: bool = False,
        n_jobs: int = 1,
        backend: str = "auto",
        batch_size: int = 1024,
        device: str | torch.device | None = None,
        infer_epochs: int = 20,
        unknown: str = "zero",
        random_state: int | np.random.RandomState | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Callable[[EpochRecord], Any]] | None = None,
        verbose: int | bool = 0,
    ) -> None:
        self.dim = dim
        self.window = window
        self.negative = negative
        self.margin = margin
        self.lr = lr
        self.min_lr_ratio = min_lr_ratio
        self.sample = sample
        self.ns_exponent = ns_exponent
        self.min_count = min_count
        self.epochs = epochs
        self.objective = objective
        self.factor = factor
        self.shuffle = shuffle
        self.max_vocab = max_vocab
        self.tokenizer = tokenizer
        self.lowercase = lowercase
        self.n_jobs = n_jobs
        self.backend = backend
        self.batch_size = batch_size
        self.device = device
        self.infer_epochs = infer_epochs
        self.unknown = unknown
        self.random_state = random_state
        self.cache_dir = cache_dir
        self.checkpoint = checkpoint
        self.callbacks = callbacks
        self.verbose = verbose

    def fit(self, docs: Documents, y: Any = None) -> "SphericalEmbedding":
        """Read the documents, and train words and documents.

        Args:
            docs: documents, each a string or a list of words; a one-shot generator will do. Or the
                path of a file with one document a line, which may be compressed.
            y: ignored.

        Raises:
            TypeError, ValueError: for parameters out of range, and as :func:`.read_corpus`.
            ValueError: if the checkpoint is of other parameters or documents.
        """
        settings = self._settings(self._new_seed())
        if self.checkpoint is not None:
            if self.random_state is None:
                raise ValueError("`checkpoint` needs a `random_state`: no run could continue it.")
            Path(self.checkpoint).mkdir(parents=True, exist_ok=True)
        is_hogwild = settings.resolved_backend() == "numba" and settings.n_jobs != 1
        if is_hogwild and self.random_state is not None:
            warnings.warn(
                "`n_jobs` other than 1: threads without locks, not reproducible by `random_state`.",
                stacklevel=2,
            )
        vocabulary, corpus = read_corpus(
            docs, min_count=self.min_count, max_vocab=self.max_vocab, cache_dir=self.cache_dir,
            tokenizer=self.tokenizer, lowercase=self.lowercase, progress=bool(self.verbose),
        )  # fmt: skip
        tables, history = self._train(settings, vocabulary, corpus)
        self.seed_ = settings.seed
        self._set_words(vocabulary.words)
        self.counts_ = vocabulary.counts
        # Views of one table: copies would double the memory.
        self.word_vectors_ = tables.words
        self.context_vectors_ = tables.contexts
        self.doc_vectors_ = tables.documents
        self.empty_documents_ = np.flatnonzero(np.diff(corpus.starts) == 0)
        self.history_ = history
        self.n_iter_ = len(history)
        return self

    def fit_transform(self, docs: Documents, y: Any = None) -> Float32[np.ndarray, "documents dim"]:
        """Fit, and return the trained vectors: ``doc_vectors_``, not those of :meth:`transform`.

        Of short or few documents the two are far apart: a trained one keeps much of its random
        start. For a classifier take ``fit(docs).transform(docs)`` for both sides.
        """
        return self.fit(docs).doc_vectors_

    def transform(self, docs: Documents) -> Float32[np.ndarray, "documents dim"]:
        """Find vectors for documents, the words being fixed.

        Nothing but its words and ``random_state`` decides over a document's vector: not the others,
        not their order, not the number of threads.

        Args:
            docs: as for :meth:`fit`.

        Returns:
            One row of length 1 per document; of one without a known word what ``unknown`` says.

        Raises:
            ValueError: before :meth:`fit`; it is scikit-learn's ``NotFittedError``.
            ValueError: for documents without a known word, if ``unknown`` is "error".
        """
        self._require("counts_")
        settings = self._settings(self.seed_)
        vocabulary = Vocabulary(self.index_to_word_, self.counts_)
        corpus = encode(docs, vocabulary, tokenizer=self.tokenizer, lowercase=self.lowercase)
        strange = np.diff(corpus.starts) == 0
        if strange.any():
            words = f"{int(strange.sum())} of {len(strange)} documents have no known word"
            if self.unknown == "error":
                raise ValueError(f"{words}, the first is number {int(strange.argmax())}.")
            warnings.warn(f"{words}; their rows are {self.unknown}.", stacklevel=2)
        vectors = infer(
            self.word_vectors_, corpus, self.counts_, settings, progress=bool(self.verbose)
        )
        vectors[strange] = np.nan if self.unknown == "nan" else 0
        return vectors

    def most_similar(
        self, positive: Any = (), negative: Any = (), topn: int = 10, space: str = "word"
    ) -> list[tuple[str | int, float]]:
        """Return what lies nearest to a mean of words, documents or vectors, as gensim does.

        Args:
            positive, negative: a key, a vector (numpy's), or a list of them, also with a weight as
                ``(key, weight)``; without one it is 1 or -1. Keys are words, or numbers of
                documents; they count with length 1, and vectors with their own.
            topn: how many.
            space: "word", "doc", or from one to the other, "word->doc" and "doc->word".

        Returns:
            Pairs of key and cosine, the nearest first; without the keys that were asked for.

        Raises:
            KeyError: for a word that is not in the vocabulary, or a document that is not there.
            TypeError: for what is neither key nor vector.
            ValueError: for another space, or if nothing is left of the mean.

        Example:
            >>> jose = SphericalEmbedding(dim=4, min_count=1, random_state=0).fit(["a b", "c d"])
            >>> [key for key, _ in jose.most_similar(1, topn=2, space="doc")]
            [0]
        """
        if space not in SPACES:
            raise ValueError(f"`space` must be one of {SPACES}; got {space!r}.")
        if not isinstance(topn, Integral) or topn < 1:
            raise ValueError(f"`topn` must be an integer, at least 1; got {topn!r}.")
        source, target = (space.split("->") * 2)[:2]
        self._require(_TABLES[source], _TABLES[target])
        table = getattr(self, _TABLES[target])
        asked: set[int] = set()
        total = np.zeros(table.shape[1])
        for item, weight in [*_weighted(positive, 1), *_weighted(negative, -1)]:
            number, vector = self._look_up(item, source)
            asked |= set() if number is None else {number}
            total += weight * vector
        length = np.linalg.norm(total)
        if not 1e-12 < length < np.inf:
            raise ValueError("`positive` and `negative` must leave a direction; they cancel out.")
        # `einsum` computes in float64 without a copy of the table.
        norms = np.sqrt(np.einsum("ij,ij->i", table, table, dtype=np.float64))
        cosines = np.einsum("ij,j->i", table, total / length, dtype=np.float64)
        cosines /= np.where(norms > 0, norms, 1)
        skipped = asked if source == target else set()
        nearest = np.argsort(-cosines, kind="stable")[: topn + len(skipped)].tolist()
        nearest = [number for number in nearest if number not in skipped][:topn]
        keys = self.index_to_word_ if target == "word" else range(len(table))
        return [(keys[number], float(cosines[number])) for number in nearest]

    def similarity(self, a: str, b: str) -> float:
        """Return the cosine of two words.

        Raises:
            KeyError: for a word that is not in the vocabulary.
        """
        self._require("word_vectors_")
        (_, first), (_, second) = self._look_up(a, "word"), self._look_up(b, "word")
        return float(first @ second)

    def word_similarity(self, pairs: Iterable[tuple[str, str, Real]]) -> tuple[float, int, int]:
        """Compare the cosines of pairs of words with what people say of them.

        Args:
            pairs: two words and a score.

        Returns:
            Spearman's rank correlation, the number of pairs whose words are both known, and the
            number of all pairs. NaN for fewer than two known pairs.
        """
        from scipy.stats import spearmanr

        self._require("word_vectors_")
        pairs = list(pairs)
        known = [(a, b, score) for a, b, score in pairs if {a, b} <= self.vocabulary_.keys()]
        if len(known) < 2:
            return float("nan"), len(known), len(pairs)
        cosines = [self.similarity(a, b) for a, b, _ in known]
        rho = spearmanr(cosines, [score for _, _, score in known]).statistic
        return float(rho), len(known), len(pairs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; parameters and words are JSON in its header.

        A ``tokenizer`` and ``callbacks`` are functions and stay behind.
        """
        self._require("counts_")
        parameters = self.get_params(deep=False) | {"random_state": self.seed_}
        del parameters["tokenizer"], parameters["callbacks"]
        about = {
            "parameters": {name: _plain(value) for name, value in parameters.items()},
            "has_tokenizer": self.tokenizer is not None,
            "words": self.index_to_word_,
            "history": [asdict(record) for record in self.history_],
        }
        tensors = {name: getattr(self, name) for name in (*_TABLES.values(), "counts_")}
        write_model(path, tensors | {"empty_documents_": self.empty_documents_}, about)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None
    ) -> "SphericalEmbedding":
        """Read what :meth:`save` has written.

        Args:
            path: the file.
            tokenizer: the one of the model that was saved, if it had one.

        Raises:
            ValueError: if it is another file, or needs a tokenizer and gets none.
        """
        tensors, about = read_model(path)
        if "has_tokenizer" not in about:
            raise ValueError(f"{path} is no model that `save` has written.")
        if about["has_tokenizer"] != (tokenizer is not None):
            had = "had one" if about["has_tokenizer"] else "had none"
            raise ValueError(f"`tokenizer` must be that of the model in {path}, which {had}.")
        model = cls(**about["parameters"], tokenizer=tokenizer)
        for name, tensor in tensors.items():
            setattr(model, name, tensor)
        model._set_words(about["words"])
        model.history_ = [EpochRecord(**record) for record in about["history"]]
        model.n_iter_, model.seed_ = len(model.history_), model.random_state
        return model

    def save_word2vec(
        self, path: str | os.PathLike[str], which: str = "word", binary: bool = False
    ) -> None:
        """Write vectors for gensim and others, as :func:`.write_word2vec` does.

        Args:
            path: the file.
            which: "word", "context" or "doc"; documents are named by their numbers.
            binary: bytes instead of text.
        """
        if which not in _TABLES:
            raise ValueError(f"`which` must be one of {tuple(_TABLES)}; got {which!r}.")
        self._require(_TABLES[which])
        vectors = getattr(self, _TABLES[which])
        keys = range(len(vectors)) if which == "doc" else self.index_to_word_
        write_word2vec(path, keys, vectors, binary=binary)

    @classmethod
    def load_word2vec(cls, path: str | os.PathLike[str]) -> "SphericalEmbedding":
        """Read word vectors of any program of word2vec's form, as text or bytes.

        The result answers questions about words. It cannot embed documents: such a file has no
        counts. Vectors stay as they are, whatever their length.
        """
        words, vectors = read_word2vec(path)
        model = cls(dim=vectors.shape[1])
        model.word_vectors_ = vectors
        model._set_words(words)
        return model

    # --- inside -----------------------------------------------------------------------------------

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    @property
    def _n_features_out(self) -> int:
        return self.word_vectors_.shape[1]

    def _settings(self, seed: int) -> Settings:
        if self.unknown not in UNKNOWN:
            raise ValueError(f"`unknown` must be one of {UNKNOWN}; got {self.unknown!r}.")
        functions = () if self.callbacks is None else self.callbacks
        if not isinstance(functions, Sequence) or not all(map(callable, functions)):
            raise TypeError(f"`callbacks` must be a list of functions; got {functions!r}.")
        names = [field.name for field in fields(Settings) if field.name != "seed"]
        return Settings(**{name: getattr(self, name) for name in names}, seed=seed)

    def _new_seed(self) -> int:
        state = self.random_state
        if state is None or isinstance(state, np.random.RandomState):
            return int(check_random_state(state).randint(2**31 - 1))
        if isinstance(state, bool) or not isinstance(state, Integral) or not 0 <= state < 2**64:
            raise ValueError(
                f"`random_state` must be None, a RandomState or in [0, 2**64); got {state!r}."
            )
        return int(state)

    def _train(
        self, settings: Settings, vocabulary: Vocabulary, corpus: Corpus
    ) -> tuple[Tables, list[EpochRecord]]:
        tables = new_tables(len(vocabulary), len(corpus), settings)
        history, path, run = [], None, None
        if self.checkpoint is not None:
            path = Path(self.checkpoint) / "checkpoint.safetensors"
            run = _fingerprint(settings, vocabulary, corpus)
            if path.exists():
                history = _continue(path, run, tables)
        records = train(
            tables, corpus, vocabulary.counts, settings,
            first_epoch=len(history), progress=bool(self.verbose),
        )  # fmt: skip
        for record in records:
            history.append(record)
            if path is not None:
                about = {"run": run, "history": [asdict(each) for each in history]}
                write_model(path, {"vectors": tables.vectors}, about)
            for callback in self.callbacks or ():
                callback(record)
        return tables, history

    def _set_words(self, words: Iterable[str]) -> None:
        self.index_to_word_ = tuple(words)
        self.vocabulary_ = {word: number for number, word in enumerate(self.index_to_word_)}

    def _require(self, *attributes: str) -> None:
        message = "this %(name)s has no {}: call `fit`; a word2vec file has words alone."
        check_is_fitted(self, attributes, msg=message.format(" or no ".join(attributes)))

    def _look_up(self, item: Any, space: str) -> tuple[int | None, Float64[np.ndarray, "dim"]]:
        """The number of a key, and its unit vector; a vector has no number, and its own length."""
        table = getattr(self, _TABLES[space])
        if isinstance(item, np.ndarray):
            if item.shape != table.shape[1:]:
                raise ValueError(f"a vector must have shape {table.shape[1:]}; got {item.shape}.")
            return None, item.astype(np.float64)
        is_word = space == "word"
        keys, kind = (self.vocabulary_, str) if is_word else (range(len(table)), Integral)
        if not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"{space}s are of type {kind.__name__}, vectors arrays; got {item!r}.")
        if item not in keys:
            raise KeyError(f"the {space} {item!r} is not among the {len(keys):,} of this model.")
        number = keys[item]
        vector = table[number].astype(np.float64)
        return number, vector / (np.linalg.norm(vector) or 1)


def _weighted(items: Any, weight: int) -> list[tuple[Any, float | int]]:
    """Keys or vectors with their weights, in gensim's forms: one, or a list, or with a number."""
    items = [] if items is None else items
    if isinstance(items, str | Integral) or (isinstance(items, np.ndarray) and items.ndim == 1):
        items = [items]
    pairs = [item if isinstance(item, tuple) else (item, weight) for item in items]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], Real):
            raise TypeError(f"a key with a weight must be `(key, weight)`; got {pair!r}.")
    return pairs


def _plain(value: Any) -> Any:
    """A parameter as JSON has it."""
    if isinstance(value, np.generic):  # of a grid made by numpy
        return value.item()
    return value if isinstance(value, str | int | float | None) else str(value)


def _fingerprint(settings: Settings, vocabulary: Vocabulary, corpus: Corpus) -> str:
    """Of all that decides over the trained vectors, but for the number of threads."""
    backend = settings.resolved_backend()
    decisive = asdict(replace(settings, backend=backend, n_jobs=1, infer_epochs=1))
    about = [{name: _plain(value) for name, value in decisive.items()}, vocabulary.words]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(corpus.starts)
    digest.update(corpus.tokens)
    return digest.hexdigest()


def _continue(path: Path, run: str, tables: Tables) -> list[EpochRecord]:
    """Fill the tables with those of the last epoch, and return the history up to it."""
    saved, about = read_model(path)
    if about.get("run") != run:
        raise ValueError(
            f"`checkpoint` {path} is of a run with other parameters or documents; "
            f"nothing was changed. Remove it, or name another folder."
        )
    tables.vectors[:] = saved["vectors"]
    return [EpochRecord(**record) for record in about["history"]]
