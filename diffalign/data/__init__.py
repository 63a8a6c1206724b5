"""Preference data: read in common formats, encoded once, served in a reproducible order."""

from diffalign.data.batches.source import PairSource, fixed_batches
from diffalign.data.encoding.encode import encode_preferences
from diffalign.data.encoding.encoded import EncodedSet, Record, split_holdout
from diffalign.data.prompts.prompt_sets import PromptSet, read_prompt_set, read_prompts
from diffalign.data.reading.examples import Counts, Example, ImageRef, Preferences
from diffalign.data.reading.presence import check_files
from diffalign.data.reading.readers import check_data, read_preferences

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
    "check_files",
    "encode_preferences",
    "fixed_batches",
    "read_preferences",
    "read_prompt_set",
    "read_prompts",
    "split_holdout",
]
