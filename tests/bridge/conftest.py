from __future__ import annotations

import pytest


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Hosts have either loop."""
    return "asyncio", {"use_uvloop": request.param == "uvloop"}
