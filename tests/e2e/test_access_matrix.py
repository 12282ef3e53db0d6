"""Every method and route of the gateway with every kind of credential, against the checked-in file."""

from __future__ import annotations

from services.mesh.actions import ACTIONS, OPEN_METHODS
from tests.conftest import MeshFactory
from tests.framework import access_matrix


async def test_r26_the_access_matrix_is_as_written(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    await mesh.start(*access_matrix.SERVICES)
    found = await access_matrix.measure(mesh)
    undeclared = found.by_method.keys() - ACTIONS.keys() - OPEN_METHODS
    for method in undeclared:
        assert "allowed" not in found.by_method[method].values(), method
    assert ACTIONS.keys() | OPEN_METHODS <= found.by_method.keys()
    said = "If this is meant, write it: " + access_matrix.COMMAND
    assert access_matrix.render(found).splitlines() == access_matrix.FILE.read_text().splitlines(), said
