"""What the libraries say beside a run: the notes that nobody can use are hidden, and nothing else is."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import tiny_config, tiny_folder

from minigad.quiet import KERNEL_LOGGER, KERNEL_NOTE, RENAMED_NOTE, without_notes
from minigad.student import Student


@pytest.fixture
def said(monkeypatch):
    """Let bitsandbytes' logger warn; return what got past its filters."""
    logger, heard = logging.getLogger(KERNEL_LOGGER), []
    monkeypatch.setattr(logger, "filters", [])
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)

    def warn(sentence):
        heard.clear()
        logger.warning(sentence, "kernels")
        return heard.copy()

    yield warn
    logger.removeHandler(handler)


def test_one_note_is_hidden_and_everything_else_of_its_logger_is_heard(said):
    note = f"{KERNEL_NOTE} from kernels-community: %s"
    with without_notes():
        with without_notes():
            assert said(note) == []
        assert said(note) == []
        assert said("another problem: %s") == ["another problem: kernels"]
    assert said(note) == [note % "kernels"]


def test_filters_and_warnings_are_put_back_whatever_happens(said):
    before = warnings.filters.copy()
    with pytest.raises(OSError, match="broken"), without_notes():
        raise OSError("broken")
    assert warnings.filters == before
    assert logging.getLogger(KERNEL_LOGGER).filters == []


def test_one_warning_is_hidden_and_every_other_is_raised():
    with without_notes():
        warnings.warn(f"{RENAMED_NOTE} and will be removed", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="something else"):
            warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="is_gradient"):
            warnings.warn(RENAMED_NOTE, UserWarning, stacklevel=1)


def test_weights_are_written_without_a_bar_in_a_log_file_and_the_users_switch_is_as_before(tmp_path, capfd):
    from transformers.utils import logging as switches

    student = Student.load(tiny_config(student=str(tiny_folder(tmp_path / "base")), lora_r=0))
    assert "Writing model shards" in capfd.readouterr().err  # tiny_folder's own: transformers' way
    student.save_pretrained(tmp_path / "student")
    assert capfd.readouterr().err == ""
    assert switches.is_progress_bar_enabled()


SCRIPT = """
import sys
from minigad.config import GADConfig
from minigad.merge import merge
from minigad.student import Student

base, out = sys.argv[1:]
config = GADConfig(student=base, lora_r=4, quantization="nf4", dtype="bfloat16", gradient_checkpointing=True, max_prompt_length=64)
student = Student.load(config)
student.freeze_reference()
student.save_pretrained(f"{out}/adapter")
merge(Student.from_pretrained(f"{out}/adapter", config), f"{out}/plain")
"""


def test_a_four_bit_student_is_loaded_saved_and_merged_without_a_word(tmp_path):
    pytest.importorskip("bitsandbytes")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tiny_folder(tmp_path / "base")), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
