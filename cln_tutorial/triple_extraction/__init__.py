r"""Triple extraction: which subject has which relation to which object, each with its place.

.. math:: P(s, p, o \mid x) = P(s \mid x)\, P(p, o \mid s, x), \qquad
    p_{\text{start}}, p_{\text{end}} = \sigma(z)^n

Source: Su Jianlin, article 7161 (https://kexue.fm/archives/7161), 2020, after 6671 and 7124, with
8373, 8877 and 8888 for GlobalPointer; Wei, Su, Wang, Tian & Chang 2020, CasRel (arXiv 1909.03227).
"""

from cln_tutorial.triple_extraction.alignment import (
    TokenAlignment,
    Window,
    encode_windows,
    locate,
    pad_windows,
)
from cln_tutorial.triple_extraction.baseline import DictionaryBaseline
from cln_tutorial.triple_extraction.characters import CharTokenizer
from cln_tutorial.triple_extraction.collation import TripleCollator
from cln_tutorial.triple_extraction.decoding import (
    DecodedTriples,
    decode_cascade,
    decode_global_pointer,
    decode_spans,
)
from cln_tutorial.triple_extraction.encoders import EncoderOutput, SmallEncoder
from cln_tutorial.triple_extraction.evaluation import Report, Score, overlap_class, score_triples
from cln_tutorial.triple_extraction.global_pointer import (
    efficient_global_pointer_loss,
    global_pointer_loss,
)
from cln_tutorial.triple_extraction.grammar import made_sentences
from cln_tutorial.triple_extraction.losses import power_bce_loss, power_sigmoid_logit
from cln_tutorial.triple_extraction.model import TripleExtractor, TripleOutput
from cln_tutorial.triple_extraction.pipeline import TriplePipeline, pipeline
from cln_tutorial.triple_extraction.prediction import evaluate, predict
from cln_tutorial.triple_extraction.sampling import (
    article_negative_rate,
    article_pair_distribution,
    article_subject_distribution,
    draw_article_subject,
    expected_negative_rate,
)
from cln_tutorial.triple_extraction.triples import Example, Triple

__all__ = [
    "CharTokenizer",
    "DecodedTriples",
    "DictionaryBaseline",
    "EncoderOutput",
    "Example",
    "Report",
    "Score",
    "SmallEncoder",
    "TokenAlignment",
    "Triple",
    "TripleCollator",
    "TripleExtractor",
    "TripleOutput",
    "TriplePipeline",
    "Window",
    "article_negative_rate",
    "article_pair_distribution",
    "article_subject_distribution",
    "decode_cascade",
    "decode_global_pointer",
    "decode_spans",
    "draw_article_subject",
    "efficient_global_pointer_loss",
    "encode_windows",
    "evaluate",
    "expected_negative_rate",
    "global_pointer_loss",
    "locate",
    "made_sentences",
    "overlap_class",
    "pad_windows",
    "pipeline",
    "power_bce_loss",
    "power_sigmoid_logit",
    "predict",
    "score_triples",
]
