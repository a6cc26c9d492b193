"""Every example in the library runs, and every public symbol has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import netdeconv_jax

MODULES = [
    "netdeconv_jax",
    *(info.name for info in pkgutil.walk_packages(netdeconv_jax.__path__, "netdeconv_jax.")),
]


def public_symbols():
    """Functions and classes of every `__all__`, each once, by the shortest name that it has."""
    seen = {}
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            symbol = getattr(module, name)
            if inspect.isfunction(symbol) or inspect.isclass(symbol):
                seen.setdefault(symbol, f"{module.__name__}.{name}")
    return seen


SYMBOLS = public_symbols()


def test_the_packages_say_what_is_public():
    assert len(MODULES) >= 10
    assert len(SYMBOLS) >= 15
    for name in ("netdeconv_jax", "netdeconv_jax.ops", "netdeconv_jax.whitening"):
        module = importlib.import_module(name)
        assert list(module.__all__) == sorted(module.__all__)
        for symbol in module.__all__:
            assert hasattr(module, symbol)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_do_what_they_say(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder()
    examples = [
        test
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(examples) >= 14


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


@pytest.mark.parametrize("symbol", SYMBOLS, ids=SYMBOLS.get)
def test_a_public_symbol_has_a_docstring_with_an_example(symbol):
    assert ">>>" in (symbol.__doc__ or "")


@pytest.mark.parametrize("symbol", SYMBOLS, ids=SYMBOLS.get)
def test_a_public_symbol_says_where_it_comes_from(symbol):
    assert "Source:" in (symbol.__doc__ or "")
