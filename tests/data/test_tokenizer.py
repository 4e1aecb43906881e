"""Every tokenizer: the text comes back, ids stay in range, documents cannot contain their end."""

import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rla_jax.data import DataError, load_tokenizer, tokenizer
from tests.data.texts import words, write

TEXTS = ['', 'a', '  two  spaces\n\n\tand a tab ', 'naïve größe 状態 🙂', 'x</s><|endoftext|><s>']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One BPE in the three forms it is published in, and a SentencePiece model."""
  import sentencepiece
  from tokenizers import ByteLevelBPETokenizer

  folder = tmp_path_factory.mktemp('tokenizers')
  bpe = ByteLevelBPETokenizer()
  bpe.train_from_iterator(words(200), vocab_size=400, special_tokens=['<|endoftext|>'])
  for form, vocab, merges in (('new', 'vocab.json', 'merges.txt'),
                              ('old', 'encoder.json', 'vocab.bpe')):
    (folder / form).mkdir()
    bpe.save_model(str(folder / form))
    (folder / form / 'vocab.json').rename(folder / form / vocab)
    (folder / form / 'merges.txt').rename(folder / form / merges)
  (folder / 'json').mkdir()
  bpe.save(str(folder / 'json' / 'tokenizer.json'))
  (folder / 'piece').mkdir()
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(words(200)), model_writer=model, vocab_size=295, byte_fallback=True,
    character_coverage=0.99, normalization_rule_name='identity', remove_extra_whitespaces=False,
    minloglevel=2,
  )
  write(folder / 'piece' / 'tokenizer.model', model.getvalue())
  return folder


@pytest.fixture(params=['byte', 'new', 'old', 'json', 'piece'])
def any_tokenizer(request, folder):
  return load_tokenizer('byte' if request.param == 'byte' else str(folder / request.param))


def test_round_trip(any_tokenizer):
  for text in TEXTS + words(30):
    ids = any_tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.decode_bytes(ids) == text.encode()
    np.testing.assert_array_equal(any_tokenizer.encode(text.encode()), ids)


def test_document_ids(any_tokenizer):
  t = any_tokenizer
  assert 0 <= t.bos_id < t.vocab_size
  assert 0 <= t.eos_id < t.vocab_size
  for text in TEXTS:
    ids = t.encode(text)
    assert not np.isin(ids, (t.bos_id, t.eos_id)).any()
    assert t.decode([t.bos_id, *ids, t.eos_id]) == text


def test_batch_is_one_by_one(any_tokenizer):
  for ids, text in zip(any_tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
    np.testing.assert_array_equal(ids, any_tokenizer.encode(text))
  assert any_tokenizer.encode_batch([]) == []


def test_ids_out_of_range(any_tokenizer):
  for wrong in ([-1], [0, any_tokenizer.vocab_size]):
    with pytest.raises(ValueError, match='ids reach from'):
      any_tokenizer.decode(wrong)


def test_invalid_utf8(any_tokenizer):
  if any_tokenizer.name == 'byte':
    assert any_tokenizer.encode(b'a\xff').tolist() == [97, 255]
    assert any_tokenizer.decode([97, 255]) == 'a\ufffd'
  else:
    with pytest.raises(UnicodeDecodeError):
      any_tokenizer.encode(b'a\xff')


@given(st.binary())
def test_byte_tokenizer_is_exact_for_any_bytes(text):
  byte = load_tokenizer('byte')
  ids = byte.encode(text)
  assert ids.size == len(text)
  assert byte.decode_bytes(ids) == text


def test_forms_of_one_bpe_agree(folder):
  forms = [load_tokenizer(str(folder / name)) for name in ('new', 'old', 'json')]
  forms.append(load_tokenizer(str(folder / 'json' / 'tokenizer.json')))
  for text in TEXTS + words(30):
    for form in forms[1:]:
      np.testing.assert_array_equal(form.encode(text), forms[0].encode(text))
  assert len({form.fingerprint for form in forms}) == 2  # The .json names its special tokens.
  assert all(form.bos_id == form.eos_id == 0 for form in forms)


def test_fingerprint_follows_the_file(folder, tmp_path):
  before = load_tokenizer(str(folder / 'new'))
  shutil.copytree(folder / 'new', tmp_path / 'copy')
  assert load_tokenizer(str(tmp_path / 'copy')).fingerprint == before.fingerprint
  merges = (tmp_path / 'copy' / 'merges.txt').read_text().splitlines()
  (tmp_path / 'copy' / 'merges.txt').write_text('\n'.join(merges[:-1]))
  assert load_tokenizer(str(tmp_path / 'copy')).fingerprint != before.fingerprint


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab1 \n\t's._é状🙂\x1f\u3000"), max_size=60))
def test_pieces_have_the_tokens_of_the_whole(folder, text):
  # Hypothesis forbids function-scoped fixtures such as monkeypatch.
  limit, tokenizer._PIECE_CHARACTERS = tokenizer._PIECE_CHARACTERS, 2
  try:
    bpe = load_tokenizer(str(folder / 'new'))
    assert bpe._cuttable
    cut = bpe.encode(text)
    assert ''.join(tokenizer._cut(text)) == text
    bpe._cuttable = False
    np.testing.assert_array_equal(cut, bpe.encode(text))
  finally:
    tokenizer._PIECE_CHARACTERS = limit


def test_words_that_start_otherwise_are_never_cut(folder, tmp_path):
  description = json.loads((folder / 'json' / 'tokenizer.json').read_text())
  description['pre_tokenizer']['add_prefix_space'] = True
  (tmp_path / 't.json').write_text(json.dumps(description))
  prefixed = load_tokenizer(str(tmp_path / 't.json'))
  assert not prefixed._cuttable
  long = 'a of ' * tokenizer._PIECE_CHARACTERS
  assert prefixed.decode(prefixed.encode(long)) == ' ' + long


def test_vocabulary_without_document_ids_is_extended(folder, tmp_path):
  description = json.loads((folder / 'json' / 'tokenizer.json').read_text())
  description['added_tokens'] = []
  vocabulary = description['model']['vocab']
  del vocabulary['<|endoftext|>']
  description['model']['vocab'] = {token: id - 1 for token, id in vocabulary.items()}
  (tmp_path / 't.json').write_text(json.dumps(description))
  bare = load_tokenizer(str(tmp_path / 't.json'))
  assert bare.bos_id == bare.eos_id == len(vocabulary) == bare.vocab_size - 1
  assert bare.decode([bare.bos_id, *bare.encode('state'), bare.eos_id]) == 'state'


ERRORS = {
  'missing': ('no.json', None, "'.*no.json' is neither 'byte' nor an existing file"),
  'suffix': ('t.bin', b'x', "ends in '.bin', expected .json, .model or a folder"),
  'json': ('t.json', b'{"a": 1}', 't.json is no `tokenizers` file'),
  'model': ('t.model', b'abc', 't.model is no SentencePiece model'),
}


@pytest.mark.parametrize(('name', 'content', 'message'), ERRORS.values(), ids=ERRORS.keys())
def test_errors(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message):
    load_tokenizer(str(tmp_path / name))


def test_folder_errors(tmp_path, folder):
  with pytest.raises(DataError, match=r'holds neither tokenizer.json, nor vocab.json'):
    load_tokenizer(str(tmp_path))
  (tmp_path / 'vocab.json').write_text('{"a": 0}')
  (tmp_path / 'merges.txt').write_text('x y\n')
  with pytest.raises(DataError, match='are no GPT-2 vocabulary and merges'):
    load_tokenizer(str(tmp_path))


def test_gpt2(data_dir):
  gpt2 = load_tokenizer(str(data_dir / 'tokenizer' / 'gpt2'))
  assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id) == (50257, 50256, 50256)
  assert gpt2.encode('Hello world').tolist() == [15496, 995]
  assert gpt2.encode(' Hello   world\n').tolist() == [18435, 220, 220, 995, 198]


def test_mistral(data_dir):
  mistral = load_tokenizer(str(data_dir / 'tokenizer' / 'mistral_v1'))
  assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id) == (32000, 1, 2)
  assert mistral.encode('Hello world').tolist() == [22557, 1526]
  for text in TEXTS:
    assert mistral.decode(mistral.encode(text)) == text


def test_mix_bpe(data_dir):
  mix = load_tokenizer(str(data_dir / 'tokenizer' / 'mix_bpe_16384'))
  assert (mix.vocab_size, mix.bos_id, mix.eos_id) == (16384, 0, 0)
  for text in TEXTS:
    assert mix.decode(mix.encode(text)) == text
