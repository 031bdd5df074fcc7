"""Block devices and front-ends for their tests; the fixtures are those of the back-end's tests."""

from tests.backend.conftest import Serve, serve

__all__ = ["Serve", "serve"]
