"""One small interface over byte-level, BPE and SentencePiece tokenizers.

The libraries behind the file formats are imported when a tokenizer of that format is loaded.
"""

import abc
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, Int32

from rla_jax.data.sources import DataError

# Names under which published vocabularies keep the tokens that open and close a document.
_BOS_NAMES = ('<s>', '<bos>', '<|begin_of_text|>', '<|endoftext|>')
_EOS_NAMES = ('</s>', '<eos>', '<|end_of_text|>', '<|endoftext|>')
# The `tokenizers` library needs over 100 bytes of memory for a character it is working on.
_PIECE_CHARACTERS = 1 << 15
_PIECES_AT_ONCE = 128
_CUT = re.compile(r'(?<=[^\W_])(?=[ \n][^\W_])')


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  Attributes:
    name: for people.
    vocab_size: S; all ids are below it.
    bos_id: precedes the first token of a document.
    eos_id: follows the last token of a document.
    fingerprint: SHA-256 of everything that determines the ids.
  """

  name: str
  vocab_size: int
  bos_id: int
  eos_id: int
  fingerprint: str

  def encode(self, text: str | bytes) -> Int32[np.ndarray, 'N']:
    """Token ids of a text, int32 [N]; adds neither bos nor eos, and yields them for no text.

    Raises:
      UnicodeDecodeError: bytes that are not UTF-8, unless the tokenizer is byte-level.
    """
    return self.encode_batch([text])[0]

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str | bytes]) -> list[Int32[np.ndarray, 'N']]:
    """`encode` of many texts at once, which some tokenizers do in parallel."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int] | Int[np.ndarray, 'N']) -> str:
    """The text of token ids [N]; bos and eos stand for no text, broken UTF-8 becomes U+FFFD."""

  def decode_bytes(self, ids: Sequence[int] | Int[np.ndarray, 'N']) -> bytes:
    """The UTF-8 bytes of token ids [N]; exact for any bytes if the tokenizer is byte-level."""
    return self.decode(ids).encode()


class ByteTokenizer(Tokenizer):
  """The 256 byte values, 256 for the start and 257 for the end of a document."""

  name = 'byte'
  vocab_size = 258
  bos_id = 256
  eos_id = 257
  fingerprint = hashlib.sha256(b'256 bytes, bos 256, eos 257').hexdigest()

  def encode_batch(self, texts):
    return [np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32) for text in texts]

  def decode(self, ids):
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def decode_bytes(self, ids):
    ids = _checked(ids, self.vocab_size)
    return ids[ids < 256].astype(np.uint8).tobytes()


class BPETokenizer(Tokenizer):
  """A tokenizer of the Hugging Face `tokenizers` library.

  Special tokens written out in a text are ordinary text, so that no document can contain its end.
  """

  def __init__(self, tokenizer, name: str, content: bytes):
    """Wraps `tokenizers.Tokenizer`; content is what its fingerprint is taken from."""
    self._tokenizer = tokenizer
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self.name = name
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    self.bos_id, self.eos_id, self.vocab_size = _document_ids(
      vocabulary, max(vocabulary.values()) + 1
    )
    self._cuttable = _is_gpt2_like(json.loads(tokenizer.to_str()))
    self.fingerprint = _fingerprint('bpe', content, self)

  def encode_batch(self, texts):
    texts = [_as_str(text) for text in texts]
    pieces = [list(_cut(text)) if self._cuttable else [text] for text in texts]
    flat = [piece for text_pieces in pieces for piece in text_pieces]
    ids = []
    for begin in range(0, len(flat), _PIECES_AT_ONCE):
      encodings = self._tokenizer.encode_batch_fast(
        flat[begin : begin + _PIECES_AT_ONCE], add_special_tokens=False
      )
      ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
    ends = itertools.accumulate((len(text_pieces) for text_pieces in pieces), initial=0)
    return [np.concatenate(ids[begin:end]) for begin, end in itertools.pairwise(ends)]

  def decode(self, ids):
    ids = _without(_checked(ids, self.vocab_size), self.bos_id, self.eos_id)
    return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model."""

  def __init__(self, processor, name: str, content: bytes):
    """Wraps `sentencepiece.SentencePieceProcessor`; content is the model file."""
    self._processor = processor
    self.name = name
    size = processor.get_piece_size()
    known = {}
    if processor.bos_id() >= 0:
      known['<s>'] = processor.bos_id()
    if processor.eos_id() >= 0:
      known['</s>'] = processor.eos_id()
    self.bos_id, self.eos_id, self.vocab_size = _document_ids(known, size)
    self.fingerprint = _fingerprint('sentencepiece', content, self)

  def encode_batch(self, texts):
    pieces = self._processor.encode([_as_str(text) for text in texts], out_type=int)
    return [np.array(ids, np.int32) for ids in pieces]

  def decode(self, ids):
    ids = _without(_checked(ids, self.vocab_size), self.bos_id, self.eos_id)
    return self._processor.decode(ids.tolist())


def load_tokenizer(spec: str) -> Tokenizer:
  """Loads a tokenizer.

  A document opens with bos_id and closes with eos_id. They are found by their usual names; a
  vocabulary that has only one of them uses it for both, and one that has neither is extended by
  one id, its vocab_size before.

  Args:
    spec: "byte"; a Hugging Face `tokenizers` file (.json); a SentencePiece model (.model); or a
      folder that holds tokenizer.json, or vocab.json (encoder.json) with merges.txt (vocab.bpe),
      or tokenizer.model, looked for in this order.

  Returns:
    The tokenizer.

  Raises:
    DataError: the file is missing or is no tokenizer of its format.
  """
  if spec == ByteTokenizer.name:
    return ByteTokenizer()
  path = pathlib.Path(spec).expanduser()
  if path.is_dir():
    if (path / 'tokenizer.json').is_file():
      return _load_json(path / 'tokenizer.json', path.name)
    vocab = _first_file(path, 'vocab.json', 'encoder.json')
    merges = _first_file(path, 'merges.txt', 'vocab.bpe')
    if vocab and merges:
      return _load_gpt2(vocab, merges, path.name)
    if (path / 'tokenizer.model').is_file():
      return _load_sentencepiece(path / 'tokenizer.model', path.name)
    raise DataError(
      f'tokenizer folder {spec!r} holds neither tokenizer.json, nor vocab.json (encoder.json) with '
      'merges.txt (vocab.bpe), nor tokenizer.model'
    )
  if not path.is_file():
    raise DataError(f"tokenizer {spec!r} is neither 'byte' nor an existing file or folder")
  if path.suffix == '.json':
    return _load_json(path, path.name)
  if path.suffix == '.model':
    return _load_sentencepiece(path, path.name)
  raise DataError(f'tokenizer {spec!r} ends in {path.suffix!r}, expected .json, .model or a folder')


def _load_json(path: pathlib.Path, name: str) -> BPETokenizer:
  import tokenizers

  content = path.read_bytes()
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
  except Exception as error:  # The library raises plain Exception.
    raise DataError(f'{path} is no `tokenizers` file: {error}') from error
  return BPETokenizer(tokenizer, name, content)


def _load_gpt2(vocab: pathlib.Path, merges: pathlib.Path, name: str) -> BPETokenizer:
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  try:
    model = models.BPE.from_file(str(vocab), str(merges))
  except Exception as error:  # The library raises plain Exception.
    raise DataError(f'{vocab} and {merges} are no GPT-2 vocabulary and merges: {error}') from error
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return BPETokenizer(tokenizer, name, vocab.read_bytes() + merges.read_bytes())


def _load_sentencepiece(path: pathlib.Path, name: str) -> SentencePieceTokenizer:
  import sentencepiece

  content = path.read_bytes()
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise DataError(f'{path} is no SentencePiece model: {error}') from error
  return SentencePieceTokenizer(processor, name, content)


def _is_gpt2_like(description: dict) -> bool:
  """Whether GPT-2's expression cuts the text into words, and nothing else touches it before."""
  pre_tokenizer = description['pre_tokenizer'] or {}
  return (
    pre_tokenizer.get('type') == 'ByteLevel'
    and pre_tokenizer['use_regex']
    and not pre_tokenizer['add_prefix_space']
    and description['normalizer'] is None
    and all(token['special'] for token in description['added_tokens'])
  )


def _cut(text: str) -> Iterator[str]:
  """Pieces with the same tokens as the whole: no word of GPT-2's spans from a letter to a space."""
  begin = 0
  while len(text) - begin > _PIECE_CHARACTERS:
    match = _CUT.search(text, begin + _PIECE_CHARACTERS)
    if match is None:
      break
    yield text[begin : match.start()]
    begin = match.start()
  yield text[begin:]


def _document_ids(vocabulary: dict[str, int], size: int) -> tuple[int, int, int]:
  bos = next((vocabulary[name] for name in _BOS_NAMES if name in vocabulary), None)
  eos = next((vocabulary[name] for name in _EOS_NAMES if name in vocabulary), None)
  if bos is None and eos is None:
    return size, size, size + 1
  return (eos if bos is None else bos), (bos if eos is None else eos), size


def _fingerprint(kind: str, content: bytes, tokenizer: Tokenizer) -> str:
  ids = [tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id]
  return hashlib.sha256(json.dumps([kind, *ids]).encode() + content).hexdigest()


def _first_file(folder: pathlib.Path, *names: str) -> pathlib.Path | None:
  return next((folder / name for name in names if (folder / name).is_file()), None)


def _as_bytes(text: str | bytes) -> bytes:
  return text.encode() if isinstance(text, str) else text


def _as_str(text: str | bytes) -> str:
  return text if isinstance(text, str) else text.decode('utf-8')


def _checked(ids, vocab_size: int) -> np.ndarray:
  ids = np.asarray(ids, dtype=np.int64)
  if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
    raise ValueError(f'ids reach from {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}')
  return ids


def _without(ids: np.ndarray, *special: int) -> np.ndarray:
  return ids[~np.isin(ids, special)]
