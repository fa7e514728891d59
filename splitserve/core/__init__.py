"""The nouns everything else is written in. Imports nothing of splitserve's."""
