"""Keys and values: rows that come, go and grow, and prefixes that belong to what computed them."""

import torch

from labkit.serving.kv_cache import BLOCK, Identity, PrefixCache, RowCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def numbers(row, start, stop):
    """Keys of a row's tokens, (1, heads, tokens, width), that say which they are."""
    return (1000 * row + torch.arange(start, stop).float())[None, None, :, None].expand(1, HEADS, -1, WIDTH)


def feed(cache, first, rows, starts, tokens):
    """Give rows their next tokens; what attention would see of the last layer."""
    cache.begin(first, starts, tokens)
    keys = torch.cat([numbers(row, start, start + tokens) for row, start in zip(rows, starts)])
    for layer in range(LAYERS):
        seen = cache.update(keys + layer, -keys, layer)
    return seen


def test_each_row_sees_its_own_tokens_up_to_itself_and_nothing_else():
    cache = RowCache(4)
    feed(cache, 0, [7], [0], 5)
    feed(cache, 1, [8], [0], 70)  # grows beyond what there was room for
    keys, values = feed(cache, 0, [7, 8], [5, 70], 1)
    mask = cache.mask(torch.float32, torch.device("cpu"))
    assert keys.shape == (2, HEADS, 71, WIDTH) and mask.shape == (2, 1, 1, 71)
    for i, (row, length) in enumerate(((7, 6), (8, 71))):
        visible = mask[i, 0, 0] == 0
        assert visible.sum() == length
        assert torch.equal(keys[i][:, visible], numbers(row, 0, length)[0] + 1)
        assert torch.equal(values[i][:, visible], -numbers(row, 0, length)[0])


def test_tokens_read_at_once_do_not_see_those_after_them():
    cache = RowCache(2)
    feed(cache, 0, [1], [0], 3)
    feed(cache, 0, [1], [3], 4)
    mask = cache.mask(torch.float32, torch.device("cpu"))[0, 0]
    assert torch.equal(mask == 0, torch.ones(4, 7).tril(3).bool())


def test_a_row_that_moves_keeps_its_tokens_and_one_that_went_wrong_leaves_none():
    cache = RowCache(3)
    for slot, row in enumerate((1, 2, 3)):
        feed(cache, slot, [row], [0], 4)
    cache.clear(0)
    cache.move(2, 0)
    keys, _ = feed(cache, 0, [3, 2], [4, 4], 1)
    assert torch.equal(keys[0], numbers(3, 0, 5)[0] + 1) and torch.equal(keys[1], numbers(2, 0, 5)[0] + 1)


def test_a_prefix_is_found_by_identity_and_tokens_in_whole_blocks():
    cache, prefixes = RowCache(2), PrefixCache(2**20)
    ids, mine = list(range(40)), Identity("base", "v1")
    feed(cache, 0, [5], [0], 40)
    prefixes.add(mine, ids, cache, 0)
    assert len(prefixes.find(mine, ids)) == 2
    assert len(prefixes.find(mine, ids[:32])) == 1, "one token at least is computed"
    assert len(prefixes.find(mine, [*ids[:31], 99, *ids[32:]])) == 1
    others = [Identity("base", "v2"), Identity("base"), Identity("other", "v1"), Identity("base", "v1", 0.5)]
    assert not any(prefixes.find(other, ids) for other in others)
    start = 0
    for block in prefixes.find(mine, ids):
        cache.write(1, start, block)
        start += BLOCK
    keys, _ = feed(cache, 1, [5], [32], 3)
    assert torch.equal(keys[0], numbers(5, 0, 35)[0] + 1)


def test_bytes_are_kept_to_and_the_ends_of_old_prefixes_leave_first():
    cache, size = RowCache(1), LAYERS * 2 * HEADS * BLOCK * WIDTH * 4
    prefixes, mine = PrefixCache(3 * size), Identity("base")
    first, second = list(range(48)), list(range(100, 132))
    for ids in (first, second):
        feed(cache, 0, [0], [0], len(ids))
        prefixes.add(mine, ids, cache, 0)
        assert prefixes.nbytes == sum(
            tensor.nbytes for block in prefixes.blocks.values() for pair in block for tensor in pair
        )
    assert prefixes.nbytes == 3 * size
    assert len(prefixes.find(mine, [*second, 0])) == 2 and len(prefixes.find(mine, [*first, 0])) == 1
    prefixes.add(Identity("base", "v1"), second, cache, 0)
    prefixes.forget("v1")
    assert all(identity.adapter is None for identity, _ in prefixes.blocks)
