"""Records that a task cannot learn, by what is wrong with them."""

import math

from tests.attacks.hostile import RECORDS


def nested(depth):
    """A list in a list in a list."""
    return '{"text": "x = 1", "label": 0, "more": ' + "[" * depth + "]" * depth + "}"


OF_A_TEXT = {
    "a number": {"text": 5},
    "a fraction": {"text": 0.5},
    "not a number": '{"text": NaN}',
    "a truth": {"text": True},
    "null": {"text": None},
    "nothing": {"text": ""},
    "spaces": {"text": "   \n"},
    "one token": {"text": "x"},
    "a special token": {"text": "</s>"},
    "a list": {"text": ["x = 1", "y = 2"]},
    "an object": {"text": {"inner": "x = 1"}},
    "no such field": {"body": "x = 1"},
    "an empty object": {},
    "one field more": {**RECORDS[0], "ward": 3},
    "a field of another kind": {**RECORDS[0], "age": "old"},
    "a lone surrogate": '{"text": "x = \\ud800"}',
    "a null byte": '{"text": "x = \\u0000"}',
    "a huge number": '{"text": "x = 1", "age": ' + "9" * 5000 + "}",
    "a large number": '{"text": "x = 1", "age": ' + "9" * 25 + "}",
    "infinity": '{"text": "x = 1", "age": 1e999}',
    "a long text": {"text": "x = 1\n" * 20_000},
    "a key twice": '{"text": "x = 1", "text": 7}',
    "a broken line": '{"text": "x = 1"',
    "a list for a line": "[1, 2, 3]",
    "a string for a line": '"x = 1"',
    "null for a line": "null",
    "an empty line": "",
    "bytes that are no text": b'{"text": "\xff\xfe"}',
    "a byte order mark": b'\xef\xbb\xbf{"text": "x = 1"}',
    "nested": nested(100),
}


OF_A_CLASS = {
    "below": -1,
    "beyond": 2,
    "far beyond": 10**30,
    "a whole fraction": 1.0,
    "a fraction": 0.5,
    "not a number": math.nan,
    "a word": "yes",
    "a digit": "1",
    "a truth": True,
    "null": None,
    "a list": [1],
    "an object": {"label": 1},
}


OF_AN_ANSWER = {
    "no answer": {"text": "why?"},
    "null": {"text": "why?", "answer": None},
    "an empty answer": {"text": "why?", "answer": ""},
    "no question": {"text": None, "answer": "so"},
    "no room": {"text": "why? " * 200, "answer": "so"},
    "a list": {"text": "why?", "answer": ["so"]},
    "of another kind": {"text": 7, "answer": {"so": 1}},
}
