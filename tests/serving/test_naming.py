import pytest

from labkit.serving.naming import Reference, check_name, read_alias, read_reference, read_version


@pytest.mark.parametrize("name", ["a", "support", "support-de", "r16-2026", "a" * 63])
def test_names_of_the_small_alphabet_are_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is empty"),
        ("../etc", r"has '\.' \(FULL STOP\)"),
        ("a/b", r"has '/' \(SOLIDUS\).*for example 'a-b'"),
        ("a\\b", r"\(REVERSE SOLIDUS\)"),
        (".", r"has '\.'"),
        ("Support", r"has 'S' \(LATIN CAPITAL LETTER S\).*for example 'support'"),
        ("my adapter", r"has ' ' \(SPACE\).*for example 'my-adapter'"),
        ("ѕupport", r"CYRILLIC SMALL LETTER DZE"),
        ("ｓupport", r"FULLWIDTH LATIN SMALL LETTER S.*for example 'support'"),
        ("sup\u200bport", "ZERO WIDTH SPACE"),
        ("support\n", r"has '\\n'"),
        ("support\0", r"U\+0000"),
        ("-a", "does not begin with a letter"),
        ("7b", "does not begin with a letter"),
        ("a-", "ends with '-'"),
        ("v2", "would be read as the number of a version"),
        ("con", "is a device on Windows"),
        ("a" * 10_240, "has 10,240 characters"),
        (7, "is no text"),
        (None, "is no text"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_names_are_refused_with_the_reason(name, said):
    with pytest.raises(ValueError, match=said) as error:
        check_name(name)
    assert len(str(error.value)) < 500


def test_a_reference_is_a_name_an_alias_or_a_version():
    assert read_reference("support") == Reference("support", None, "production")
    assert read_reference("support@staging") == Reference("support", None, "staging")
    assert read_reference("support@v12") == Reference("support", 12, None)
    assert [str(read_reference(text)) for text in ("a", "a@b", "a@v3")] == ["a@production", "a@b", "a@v3"]


@pytest.mark.parametrize(
    "text", ["", "@", "a@", "@v1", "a@v0", "a@v01", "a@b@c", "a@B", "a@v1.5", None, 3, b"a"]
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(ValueError):
        read_reference(text)


@pytest.mark.parametrize("text", ["support", "support@v1"])
def test_an_alias_that_is_moved_has_to_be_named(text):
    with pytest.raises(ValueError, match="is not an alias; give 'NAME@ALIAS', such as 'support@production'"):
        read_alias(text)


@pytest.mark.parametrize("text", ["support", "support@production"])
def test_a_version_that_is_deleted_has_to_be_named_by_its_number(text):
    with pytest.raises(ValueError, match="is not a version; give 'NAME@v2', with its number"):
        read_version(text)
