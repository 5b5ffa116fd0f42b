"""Intermediate variables: what modules compute inside, and the attention that nobody forms.

Source: Su Jianlin, article 6575 (https://kexue.fm/archives/6575), 2019, section 1.
"""

from cln_tutorial.intermediate_variables.attention import (
    AttentionCall,
    AttentionRecord,
    attention_weights,
    record_attention,
)
from cln_tutorial.intermediate_variables.capture import Captured, capture
from cln_tutorial.intermediate_variables.extractor import feature_extractor
from cln_tutorial.intermediate_variables.tap import Tap

__all__ = [
    "AttentionCall",
    "AttentionRecord",
    "Captured",
    "Tap",
    "attention_weights",
    "capture",
    "feature_extractor",
    "record_attention",
]
