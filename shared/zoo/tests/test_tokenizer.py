import subprocess
import sys

from pared_zoo.recipes.sd_world import MAX_TOKENS, SCENES, held_out_scenes, training_scenes
from pared_zoo.recipes.tokenizer import world_tokenizer, world_words
from pared_zoo.world import caption, sample_scenes


def test_every_word_of_captions_is_one_token():
    tokenizer = world_tokenizer(MAX_TOKENS)
    words = {w for i, s in enumerate(sample_scenes(400, 3)) for w in caption(s, i).replace(",", " ").split()}
    assert words <= set(world_words())
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)


def test_unknown_words_fall_back_to_letters_and_not_to_the_end_token():
    tokenizer = world_tokenizer(MAX_TOKENS)
    ids = tokenizer("a Hexagon!", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "ahexagon!"


def test_ids_are_the_same_in_another_process():
    text = "a small striped red ring to the left of a large blue cross"
    code = f"from pared_zoo.recipes.tokenizer import world_tokenizer as t; print(t(32)({text!r})['input_ids'])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert other.stdout.strip() == str(world_tokenizer(MAX_TOKENS)(text)["input_ids"])


def test_the_tokenizer_survives_saving(tmp_path):
    tokenizer = world_tokenizer(MAX_TOKENS)
    tokenizer.save_pretrained(tmp_path)
    text = "two large dotted purple crosses on a navy background"
    assert type(tokenizer).from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_captions_of_the_pipeline_fit_the_padded_length():
    tokenizer = world_tokenizer(MAX_TOKENS)
    lengths = [len(tokenizer(caption(s, i))["input_ids"]) for i, s in enumerate(sample_scenes(2000, 5, SCENES))]
    assert max(lengths) <= MAX_TOKENS


def test_no_held_out_caption_is_trained_on():
    held_out = {caption(s) for s in held_out_scenes()}
    assert held_out.isdisjoint(caption(s) for s in training_scenes(1500, 0))
