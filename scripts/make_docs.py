"""Write the API pages of labkit, one per module, from its docstrings: python scripts/make_docs.py build/docs

pdoc follows `__all__`. A package of labkit lists in it the names that one imports, not its modules, so the modules are
added here, before pdoc looks.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

import pdoc

import labkit


def list_modules(package) -> None:
    """Add the modules of `package` to its `__all__`, and so on in the packages inside it."""
    names = []
    for info in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        except ModuleNotFoundError as error:
            # kernels for a GPU need Triton, which is not installed without one
            print(f"left out {package.__name__}.{info.name}: {error}")
            continue
        names.append(info.name)
        if info.ispkg:
            list_modules(module)
    package.__all__ = list(dict.fromkeys([*getattr(package, "__all__", []), *names]))


def write(folder: Path, search: bool = True) -> None:
    """Write the pages into `folder`, with a search of their own or without."""
    list_modules(labkit)
    pdoc.render.configure(docformat="google", search=search)
    pdoc.pdoc("labkit", output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(f"open {Path(sys.argv[1]) / 'index.html'}")
