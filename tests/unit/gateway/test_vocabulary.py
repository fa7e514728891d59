"""What tokens are written as."""

from pathlib import Path

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.errors import ConfigError
from splitserve.gateway.vocabulary import TokenizerVocabulary
from splitserve.router.text import Text


async def test_the_texts_of_a_texts_tokens_spell_it() -> None:
    vocabulary, text = TokenizerVocabulary(DEMO_MODEL), "It is a truth, universally acknowledged"
    tokeniser = Text(DEMO_MODEL)
    token_ids = await tokeniser.token_ids(text, 100)
    tokeniser.close()
    assert text in "".join(map(vocabulary.text_of, token_ids))


def test_a_directory_without_a_tokenizer_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TokenizerVocabulary(tmp_path)
