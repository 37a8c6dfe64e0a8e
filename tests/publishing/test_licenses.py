"""Which licences of contributions a publisher is warned of."""

import pytest

from coldctl.publishing.licenses import warnings


@pytest.mark.parametrize(
    ("own", "found", "words"),
    [
        ("mit", "mit", None),
        ("apache-2.0", "cc-by-4.0", None),
        ("mit", "BSD-3-Clause", None),
        ("mit", "cc-by-nc-4.0", "forbids commercial use"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", None),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0", None),
        ("mit", "cc-by-nd-4.0", "forbids giving on"),
        ("mit", "cc-by-sa-4.0", "keeps that licence"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0", None),
        ("mit", "gpl-3.0", "keeps that licence"),
        ("gpl-3.0", "gpl-3.0", None),
        ("mit", None, "does not say under which licence"),
        ("mit", "other", "have to be read"),
    ],
)
def test_a_licence_that_does_not_go_with_the_model_s_is_told(own: str, found: str | None, words: str | None) -> None:
    sentences = warnings(own, [{"name": "a", "license": found, "status": "fused"}])
    assert len(sentences) == (0 if words is None else 1)
    assert words is None or words in sentences[0]


def test_what_was_refused_binds_nobody_and_equals_share_a_sentence() -> None:
    contributions = [
        {"name": "a", "license": "cc-by-nc-4.0", "status": "rejected"},
        {"name": "b", "license": "gpl-3.0", "status": "fused"},
        {"name": "c", "license": "GPL-3.0", "status": "fused"},
    ]
    assert warnings("mit", contributions) == [
        "b and c are under gpl-3.0, which asks that what is derived from it keeps that licence, not mit"
    ]
