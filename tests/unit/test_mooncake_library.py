"""What is missing is named, and how to get it."""

import pytest

from torchspec_lib.transfer.mooncake.library import missing_dependency


@pytest.mark.parametrize(
    ("message", "library", "remedy"),
    [
        (
            "libibverbs.so.1: cannot open shared object file: No such file or directory",
            "libibverbs.so.1",
            "apt-get install -y --no-install-recommends libibverbs1 libnuma1 libcurl4",
        ),
        (
            "mooncake_master ended with code 127; its log ends: /opt/lib/mooncake_master: error "
            "while loading shared libraries: libmlx5.so.1: cannot open shared object file",
            "libmlx5.so.1",
            "ibverbs-providers",
        ),
        ("libcudart.so.12: cannot open shared object file", "libcudart.so.12", "[cpu]"),
        ("libfoo-bar.so.3: cannot open shared object file", "libfoo-bar.so.3", "libfoo-bar.so.3"),
        ("No module named 'mooncake'", "isn't installed", "[gpu]"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(message: str, library: str, remedy: str):
    error = missing_dependency(message)
    assert library in error.what
    assert remedy in error.remedy
