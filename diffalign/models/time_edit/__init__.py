"""TIME: the closed-form edit of what a text-to-image model assumes of a word (Orgad et al. 2023)."""
