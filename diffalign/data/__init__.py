"""Preferences: read in the formats that people have, encoded once, served in an order nothing changes."""

from diffalign.data.encode import encode_preferences
from diffalign.data.encoded import EncodedSet, Record, split_holdout
from diffalign.data.examples import Counts, Example, ImageRef, Preferences
from diffalign.data.prompt_sets import PromptSet, read_prompt_set
from diffalign.data.prompts import read_prompts
from diffalign.data.readers import check_data, read_preferences
from diffalign.data.source import PairSource, fixed_batches

__all__ = [
    "Counts",
    "EncodedSet",
    "Example",
    "ImageRef",
    "PairSource",
    "Preferences",
    "PromptSet",
    "Record",
    "check_data",
    "encode_preferences",
    "fixed_batches",
    "read_preferences",
    "read_prompt_set",
    "read_prompts",
    "split_holdout",
]
