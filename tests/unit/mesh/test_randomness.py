"""Random bytes in blocks: nobody gets what another has got."""

from __future__ import annotations

import os

from services.mesh.randomness import BLOCK_BYTES, RandomBytes, random_bytes


def test_no_bytes_are_given_out_twice() -> None:
    source = RandomBytes()
    taken = [source.take(16) for _ in range(3 * BLOCK_BYTES // 16)]
    assert {len(each) for each in taken} == {16}
    assert len(set(taken)) == len(taken)


def test_a_fork_does_not_give_out_its_parents() -> None:
    random_bytes(16)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, random_bytes(16))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 16) != random_bytes(16)
    os.close(read)
    os.close(write)
