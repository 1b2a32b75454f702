"""Promises about the conversations of examples/docstrings_target."""

from examples.docstrings_target.corpus import conversations, functions, functions_of

DOCSTRING = "Add two numbers, which is what everybody expects of it, and nothing else."
MODULE = f'''
class Sum:
    def add(self, a, b):
        """{DOCSTRING}"""
        total = a + b
        return total

    def undocumented(self):
        return 1

def short():
    """Too short."""
    return 2
'''
CODE = "def add(self, a, b):\n    total = a + b\n    return total"


def test_a_documented_function_is_told_as_code_without_its_docstring(tmp_path):
    module = tmp_path / "sums.py"
    module.write_text(MODULE)
    (found,) = functions_of(module)
    assert found == {"signature": "def add(self, a, b):", "docstring": DOCSTRING, "code": CODE}
    document, implement = conversations([found])
    assert document["messages"][1]["content"] == DOCSTRING
    assert CODE in document["messages"][0]["content"]
    assert DOCSTRING not in document["messages"][0]["content"]
    assert implement["messages"][1]["content"] == CODE


def test_what_is_not_python_of_today_gives_nothing(tmp_path):
    old = tmp_path / "old.py"
    old.write_text("print 'hello'\n")
    assert functions_of(old) == []


def test_no_docstring_is_both_trained_on_and_held_out(tmp_path):
    files = []
    for number in range(200):
        file = tmp_path / f"module_{number}.py"
        own = f'\ndef own():\n    """{DOCSTRING} Number {number}."""\n    return {number}\n'
        file.write_text(MODULE + own)
        files.append(file)
    training, heldout = functions(files)
    told = [function["docstring"] for function in training]
    assert len(heldout) > 0
    assert len(training) + len(heldout) == 201
    assert len(set(told)) == len(told)
    assert not set(told) & {function["docstring"] for function in heldout}
