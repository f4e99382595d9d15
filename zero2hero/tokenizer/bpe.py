"""Byte-pair encoding from scratch: the whole algorithm, in the order in which one would explain it.

Byte-pair encoding (Gage 1994; Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) begins with the 256
bytes as its vocabulary and repeats one step: find the pair of neighbouring tokens that occurs most often,
and make it a new token. The list of those steps, the *merges*, is the whole of the trained model; encoding
replays it on new text, earliest merge first.

Two ideas make it fast enough for real text:

- *Words are counted once.* The split pattern cuts text into words that no merge crosses, so training needs
  only the distinct words and how often each occurs: a few ten thousand, whatever the size of the corpus.
- *A merge touches only the words that contain it.* An index leads from a pair to its words; pair counts are
  adjusted where a merge happened instead of being taken anew; a heap yields the most frequent pair. Counts
  in the heap grow stale when a later merge lowers them; an entry is checked when it surfaces and put back
  with its true count if it was stale ("lazy deletion").

`Tokenizer` does the same with the `tokenizers` library, which also encodes on all cores; tests/parity holds
the two equal, merge by merge and id by id. Here nothing is hidden.

One difference remains, in the tables of characters: `regex` and the library follow different editions of
Unicode, so characters that a recent edition added may be cut into words differently.
"""

from __future__ import annotations

import base64
import binascii
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import regex

from zero2hero.errors import UserError, did_you_mean
from zero2hero.tokenizer.patterns import (
    CHAR_TO_BYTE,
    SpecialSplitter,
    check_special_tokens,
    check_text,
    check_vocab_size,
    documents,
    split_pattern,
)

Merge = tuple[bytes, bytes]
Pair = tuple[int, int]

# GPT-2's order of the 256 single bytes: by the character that stands for them in files
BYTES_IN_ORDER: list[bytes] = [bytes([CHAR_TO_BYTE[character]]) for character in sorted(CHAR_TO_BYTE)]
_CACHED_WORDS = 100_000


class BPE:
    """A byte-level byte-pair encoding: its merges, its vocabulary, and how text is cut before merging.

    Ids are laid out as the `tokenizers` library does: special tokens, the 256 bytes, one id per merge.
    Pass `vocab` (token bytes to id) and a mapping of special tokens when a published model numbers them
    otherwise. With `ignore_merges` a word that is itself a token is taken whole (tiktoken, Llama-3).
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        *,
        pattern: str = "llama3",
        special_tokens: Sequence[str] | Mapping[str, int] = (),
        vocab: Mapping[bytes, int] | None = None,
        ignore_merges: bool = False,
    ) -> None:
        names = check_special_tokens(special_tokens)
        if vocab is None:
            tokens = BYTES_IN_ORDER + [left + right for left, right in merges]
            vocab = {token: len(names) + i for i, token in enumerate(tokens)}
        self.merges = list(merges)
        self.pattern = pattern
        self.vocab = dict(vocab)
        self.special_tokens = (
            dict(special_tokens) if isinstance(special_tokens, Mapping) else {n: i for i, n in enumerate(names)}
        )
        self.ignore_merges = ignore_merges

        self._find_words = regex.compile(split_pattern(pattern)).findall
        self._split_special = SpecialSplitter(names)
        self._byte_ids = [self._id(bytes([byte])) for byte in range(256)]
        self._ranks: dict[Pair, tuple[int, int]] = {}  # (left id, right id) -> (rank, merged id)
        for rank, (left, right) in enumerate(self.merges):
            self._ranks[self._id(left), self._id(right)] = (rank, self._id(left + right))
        self._bytes_of = {i: token for token, i in self.vocab.items()}
        for name, i in self.special_tokens.items():
            if i in self._bytes_of:
                raise UserError(f"special token {name!r} has id {i}, which is already {self._bytes_of[i]!r}.")
            self._bytes_of[i] = name.encode()
        self._cache: dict[str, list[int]] = {}

    def _id(self, token: bytes) -> int:
        if token not in self.vocab:
            raise UserError(f"the vocabulary has no token {token!r}, which the merges or the byte alphabet need.")
        return self.vocab[token]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self._bytes_of)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 4096,
        pattern: str = "llama3",
        special_tokens: Sequence[str] = (),
        *,
        tie_break: str = "ids",
    ) -> BPE:
        """Learn merges from `texts` until `vocab_size` (special tokens and bytes included) is reached.

        A small corpus may run out of pairs first; the vocabulary is then smaller. `tie_break` decides
        between pairs of equal count: "ids" takes the pair of lower ids, as the `tokenizers` library does;
        "bytes" the pair whose bytes are lexicographically greater, as Stanford's CS336 course does.
        Raises `UserError` for an impossible vocabulary size, an unknown pattern or text that is not text.
        """
        special_tokens = check_special_tokens(special_tokens)
        check_vocab_size(vocab_size, special_tokens)
        if tie_break not in _TIE_BREAKS:
            raise UserError(
                f"unknown tie_break '{tie_break}'; known: {', '.join(_TIE_BREAKS)}."
                f"{did_you_mean(tie_break, _TIE_BREAKS)}"
            )
        words = count_words(texts, pattern, special_tokens)
        merges = learn_merges(words, vocab_size - 256 - len(special_tokens), _TIE_BREAKS[tie_break])
        return cls(merges, pattern=pattern, special_tokens=special_tokens)

    @classmethod
    def from_tiktoken(
        cls, path: str | Path, pattern: str = "llama3", special_tokens: Mapping[str, int] | None = None
    ) -> BPE:
        """Read a `.tiktoken` file: one `base64(token) rank` a line, where the rank is also the id.

        The file lists tokens, not merges. But a token was made from the two parts into which all earlier
        merges turn its bytes, so replaying the earlier ranks on each token gives its merge back.
        """
        ranks = _read_ranks(Path(path))
        merges = [
            parts
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
            if len(token) > 1 and (parts := _last_two_parts(token, rank, ranks))
        ]
        return cls(merges, pattern=pattern, special_tokens=special_tokens or {}, vocab=ranks, ignore_merges=True)

    def encode(self, text: str, split_special_tokens: bool = False) -> list[int]:
        """Text to ids. With `split_special_tokens` the names of special tokens are ordinary text."""
        check_text(text)
        if split_special_tokens:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for position, piece in enumerate(self._split_special(text)):
            if position % 2:
                ids.append(self.special_tokens[piece])
            else:
                ids += self._encode_ordinary(piece)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._find_words(text):
            known = self._cache.get(word)
            if known is None:
                known = self._encode_word(word.encode())
                if len(self._cache) < _CACHED_WORDS:
                    self._cache[word] = known
            ids += known
        return ids

    def _encode_word(self, word: bytes) -> list[int]:
        """Merge the bytes of one word, lowest rank first, leftmost first where ranks are equal.

        A heap of possible merges and a doubly linked list of the tokens still alive: n log n in the length
        of the word, so that a line of 100,000 dashes costs no more than other text of that size.
        """
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        ids = [self._byte_ids[byte] for byte in word]
        end = len(ids)
        after = list(range(1, end + 1))
        before = list(range(-1, end - 1))
        heap: list[tuple[int, int, Pair]] = []  # (rank, position of the left token, the pair)

        def consider(position: int) -> None:
            if position >= 0 and after[position] < end:
                pair = (ids[position], ids[after[position]])
                if pair in self._ranks:
                    heapq.heappush(heap, (self._ranks[pair][0], position, pair))

        for position in range(end):
            consider(position)
        while heap:
            _, left, pair = heapq.heappop(heap)
            right = after[left]
            if right >= end or (ids[left], ids[right]) != pair:
                continue  # one of the two has been merged into something else since
            ids[left] = self._ranks[pair][1]
            ids[right] = -1
            after[left] = after[right]
            if after[left] < end:
                before[after[left]] = left
            consider(before[left])
            consider(left)
        return [i for i in ids if i >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not valid UTF-8 become U+FFFD. Unknown ids raise `UserError`."""
        try:
            return b"".join([self._bytes_of[i] for i in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise UserError(f"token id {error} is not in this vocabulary of {self.vocab_size} tokens.") from None


def count_words(texts: Iterable[str], pattern: str, special_tokens: Sequence[str]) -> Counter[bytes]:
    """How often each word occurs; the text of special tokens is left out."""
    find_words = regex.compile(split_pattern(pattern)).findall
    split_special = SpecialSplitter(special_tokens)
    words: Counter[str] = Counter()
    for text in documents(texts):
        for ordinary in split_special(text)[::2]:
            words.update(find_words(ordinary))
    if not words:
        raise UserError("there is no text to train a tokenizer on: every document is empty.")
    return Counter({word.encode(): count for word, count in words.items()})


def learn_merges(words: Counter[bytes], count: int, preference: Callable[[Pair, list[bytes]], object]) -> list[Merge]:
    """The first `count` merges of these words, or fewer when every word has become one token."""
    tokens = list(BYTES_IN_ORDER)  # what each id stands for; merging appends
    byte_id = {token[0]: i for i, token in enumerate(tokens)}
    spelled = [[byte_id[byte] for byte in word] for word in words]  # each distinct word as ids
    times = list(words.values())

    pair_counts: defaultdict[Pair, int] = defaultdict(int)
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(spelled):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += times[number]
            words_with[pair].add(number)

    # The smallest entry surfaces first: the highest count, then the preferred pair.
    heap = [(-pair_counts[pair], preference(pair, tokens), pair) for pair in pair_counts]
    heapq.heapify(heap)
    merges: list[Merge] = []
    while heap and len(merges) < count:
        negative_count, order, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:  # stale: a later merge took some of its occurrences
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], order, pair))
            continue
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        merged = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])

        grown: set[Pair] = set()
        for number in words_with.pop(pair):
            for changed, change in _merge_in_word(spelled[number], pair, merged):
                pair_counts[changed] += change * times[number]
                if change > 0:
                    words_with[changed].add(number)
                    grown.add(changed)
        del pair_counts[pair]
        for changed in grown:
            if pair_counts[changed] > 0:
                heapq.heappush(heap, (-pair_counts[changed], preference(changed, tokens), changed))
    return merges


def _merge_in_word(word: list[int], pair: Pair, merged: int) -> Iterator[tuple[Pair, int]]:
    """Replace `pair` by `merged` in `word`, in place; yield each neighbouring pair lost (-1) or won (+1)."""
    left, right = pair
    position = 0
    while position < len(word) - 1:
        if word[position] == left and word[position + 1] == right:
            if position > 0:
                yield (word[position - 1], left), -1
                yield (word[position - 1], merged), +1
            if position + 2 < len(word):
                yield (right, word[position + 2]), -1
                yield (merged, word[position + 2]), +1
            word[position : position + 2] = [merged]
        position += 1


def _lower_ids(pair: Pair, tokens: list[bytes]) -> Pair:
    return pair


def _greater_bytes(pair: Pair, tokens: list[bytes]) -> tuple[tuple[int, ...], ...]:
    # Sorts in reverse: negated bytes, and an end mark above them all since a longer token is the greater one.
    return tuple((*(-byte for byte in tokens[i]), 1) for i in pair)


_TIE_BREAKS: dict[str, Callable[[Pair, list[bytes]], object]] = {"ids": _lower_ids, "bytes": _greater_bytes}


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The token-to-rank table of a `.tiktoken` file."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}, line {number}: expected 'base64-token rank', found {line[:60].decode(errors='replace')!r}."
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of the 256 single bytes (the first is {missing[0]}).")
    return ranks


def _last_two_parts(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> Merge | None:
    """What `token` looks like just before its own merge; None if the ranks below never lead to two parts."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest >= rank:
            return None
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1])
