"""Bugs of the radix cache that its shadow must see."""

import pytest

from tests.engine.mutation import System, check_caught, mutate
from tests.engine.radix_model import run_shadow

MUTANTS = {  # pairs of a text in the source and what replaces it
    "lock does not keep from eviction": ("                del self._unlocked[node]\n", ""),
    "lock forgets the ancestors": (
        "            node.lock_count += 1\n            node = node.parent\n",
        "            node.lock_count += 1\n            node = None\n",
    ),
    "unlock forgets the ancestors": (
        "self._protected_pages -= len(node.pages)\n            node = node.parent\n",
        "self._protected_pages -= len(node.pages)\n            node = None\n",
    ),
    "unlock without a lock": ('raise ValueError("this node is not locked")', "return"),
    "an evicted node is locked": ("if node.parent is None and node.pages:", "if False:"),
    "a page matches by its first token": (
        "node.keys[index : index + 1] != [key]:",
        "[k[:TOKEN_BYTES] for k in node.keys[index : index + 1]] != [key[:TOKEN_BYTES]]:",
        "same = _common_tokens(",
        "same = self.page_size or (",
    ),
    "an edge matches by its first page": (
        "if same < len(node.pages) * self.page_size:",
        "if False:",
    ),
    "the whole prompt is matched": ("tokens if most is None else tokens[: max(most, 0)]", "tokens"),
    "a match counts bytes": ("lowest_bit // (8 * TOKEN_BYTES)", "-(-lowest_bit // 32)"),
    "no namespaces": ("self._roots.get(namespace)", "next(iter(self._roots.values()), None)"),
    "an empty tree stays": ("del self._roots[parent.namespace]", "pass"),
    "only the right neighbour is a donor": ("range(max(index - 1, 0)", "range(max(index, 0)"),
    "only the left neighbour is a donor": ("min(index + 1, len(node.keys))", "index"),
    "a locked tail is dropped": (" and not parent.children[index].lock_count", ""),
    "a covered tail stays": ("        self._drop_covered_tail(parent, index - 1)\n", ""),
    "a covered tail stays when unlocked": (
        "self._drop_covered_tail(leaf.parent, self._index(leaf))",
        "pass",
    ),
    "a covered tail is inserted": ("num_tokens * TOKEN_BYTES == len(tokens)", "False"),
    "a tail like another is not inserted": ("num_tokens * TOKEN_BYTES == len(tokens)", "child"),
    "the tail of a running request is inserted": ("if is_running:", "if False:"),
    "a tail gets children": (
        "if len(key) < self._page_bytes or ",
        "if ",
        "if same < len(node.pages) * self.page_size:",
        "if same * TOKEN_BYTES < len(node.tokens):",
    ),
    "a tail joins the full pages": (
        "num_full = len(tokens) // self.page_size",
        "num_full = len(pages)",
    ),
    "duplicate pages leak": ("        self.allocator.free(duplicates)\n", ""),
    "a duplicate tail leaks": ("            duplicates.append(pages[-1])\n", "            pass\n"),
    "shared pages are freed": (" if page != kept]", "]"),
    "duplicate pages stay in use": (
        "Match(node, cached + new,",
        "Match(node, list(pages[:num_full]),",
    ),
    "a page gets two owners": (" or not self._pages.isdisjoint(own)", ""),
    "pages do not fit their tokens": (
        "if len(pages) != -(-len(tokens) // self.page_size):",
        "if False:",
    ),
    "a split forgets the locks": ("        upper.lock_count = node.lock_count\n", ""),
    "a split half is never evicted": (
        "            self._unlocked[upper] = None\n",
        "            pass\n",
    ),
    "a split gives the lower half": ("        return upper\n", "        return node\n"),
    "the most recently used goes first": (
        "next(iter(self._unlocked))",
        "next(node for node in reversed(self._unlocked) if not node.children)",
    ),
    "a match is not a use": (
        "                self._touch(node)\n                return node, pages\n",
        "                return node, pages\n",
    ),
    "being a donor is not a use": ("        self._touch(donor)\n", ""),
    "the parents are not used": (
        "self._unlocked.move_to_end(node)\n            node = node.parent\n",
        "self._unlocked.move_to_end(node)\n            return\n",
    ),
    "an evicted leaf can be matched": ("del parent.keys[index], parent.children[index], ", "del "),
    "evict takes the first pages": ("del leaf.pages[-count:]", "del leaf.pages[:count]"),
    "evicted pages leak": ("        self.allocator.free(dropped)\n", ""),
    "evict stops early": ("while freed < num_pages and", "if freed < num_pages and"),
    "evict takes all of a leaf": ("min(num_pages - freed, len(leaf.pages))", "len(leaf.pages)"),
    "reset keeps pages": (
        "        self.evict(self.total_pages)\n",
        "        self._roots.clear()\n",
    ),
    "what is forgotten is matched": ("        self._roots = {}\n", ""),
    "what is forgotten stays": ("            self._drop_forgotten(leaf)\n", "            pass\n"),
    "the parents of what is forgotten stay": (
        "            self._drop_pages(node, len(node.pages))\n",
        "            self._drop_pages(node, len(node.pages))\n            return\n",
    ),
    "forgetting leaves what nobody uses": ("        self.evict(len(self._pages))\n", ""),
    "reset despite locks": ("        if self._protected_pages:\n", "        if False:\n"),
}


def shadow(system: System, most: int = 2000) -> None:
    run_shadow(system.radix_cache.RadixCache, most)


def test_shadow_agrees_where_there_is_no_bug():
    shadow(mutate(), 20)


@pytest.mark.parametrize("name", MUTANTS)
def test_shadow_sees(name: str):
    check_caught(name, MUTANTS[name], shadow)
