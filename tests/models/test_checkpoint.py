"""Checkpoints: originals are read without running what they hold; what was saved comes back."""

import collections
import hashlib
import io
import os
import pickle
import resource
import struct
import warnings

import pytest
import torch
from safetensors.torch import save_file

import fastgen
from fastgen import checkpoint
from fastgen.camera import CameraDistribution
from fastgen.eg3d_pickle import (
    Budget,
    CheckpointError,
    Held,
    Network,
    Record,
    _plain,
    _plane_axes,
    _state_dict,
    unpickle,
)
from fastgen.models.discriminator import DualDiscriminator
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A folder to work in; nothing that a test loads may write to it."""
    folder = tmp_path / "victim"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == [], "loading ran code"


def torch_file(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def storage(*values: float) -> Calls:
    # The originals hold typed storages, which torch deprecates but still reads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Calls(torch.storage._load_from_bytes, torch_file(torch.tensor(values).storage()))


SYSTEM = Calls(os.system, "touch ran")
HIDDEN = Calls(torch.storage._load_from_bytes, torch_file(SYSTEM))
OVERRUN = Calls(
    torch._utils._rebuild_tensor_v2, storage(1.0), 0, (9,), (1,), False, collections.OrderedDict()
)
OFFSET = Calls(torch._utils._rebuild_tensor_v2, storage(1.0), 5, (1,), (1,), False, collections.OrderedDict())


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(SYSTEM, r"it names (posix|nt)\.system", id="os.system"),
        pytest.param({"G_ema": [SYSTEM]}, r"it names (posix|nt)\.system", id="os.system inside"),
        pytest.param(Calls(eval, "open('ran', 'w')"), r"it names builtins\.eval", id="eval"),
        pytest.param(Calls(getattr, [1], "append"), r"names builtins\.getattr", id="getattr"),
        pytest.param({"G_ema": HIDDEN}, r"nested torch file .* it names (posix|nt)\.system", id="nested"),
        pytest.param(
            Calls(torch.storage._load_from_bytes, torch_file([1, 2])),
            "holds a list, expected a storage",
            id="not storage",
        ),
        pytest.param(
            Calls(torch.storage._load_from_bytes, b"abc"), "a nested torch file that", id="nested garbage"
        ),
        pytest.param(OVERRUN, "9 elements in a storage of 1", id="beyond storage"),
        pytest.param(OFFSET, "not a pickle .*out of bounds", id="offset beyond storage"),
        pytest.param({"weights": 1, "step": 2}, "it has no G_ema; it holds weights, step", id="other dict"),
        pytest.param([1, 2], "it has no G_ema; it holds list", id="list"),
        pytest.param({"G_ema": 3}, "G_ema is a int, expected a TriPlaneGenerator", id="number"),
        pytest.param({"G_ema": collections.OrderedDict(a=1)}, "G_ema is a OrderedDict", id="state dict"),
    ],
)
def test_hostile_and_foreign_pickles(tmp_path, victim, content, message):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(CheckpointError, match=message) as caught:
        fastgen.load_teacher(path)
    assert str(caught.value).startswith(f"{path}: refused: ")


def test_the_hostile_pickle_is_real(victim):
    # Else the tests above would prove nothing.
    pickle.loads(pickle.dumps(SYSTEM))
    (victim / "ran").unlink()


@pytest.mark.parametrize(
    "opcodes",
    [
        pytest.param(b"ctorch._utils\n_rebuild_parameter\n}b.", id="constructor"),
        pytest.param(b"ccollections\nOrderedDict\n}b.", id="record class"),
        pytest.param(b"ctorch.nn.modules.linear\nLinear\nN}X\x03\x00\x00\x00argK\x01s\x86b.", id="slots"),
        pytest.param(b"\x8c\x08builtins\x8c\x04exec\x93.", id="stack global"),
        pytest.param(b"\x8c\x0ctorch._utils\x8c\x1e_rebuild_parameter.__globals__\x93.", id="dotted name"),
        pytest.param(b"\x8c\x02ab\x94Q.", id="persistent id"),
    ],
)
def test_opcodes_that_reach_for_more(opcodes):
    with pytest.raises(CheckpointError):
        unpickle(b"\x80\x04" + opcodes)


HELD = pickle.dumps(
    Calls(torch._utils._rebuild_tensor_v2, storage(1.0), 0, (1,), (1,), False, collections.OrderedDict()), 3
)[2:-1]
ENDLESS = b")" + b"2\x86" * 40  # t = (t, t), forty times: hashing it takes 2^40 steps


@pytest.mark.parametrize(
    "opcodes, message",
    [
        (HELD + b"q\xff(h\xffK\x00J\x40\x42\x0f\x00\x85K\x01\x85tb.", "tries to change a tensor"),
        (HELD + b"q\xff(h\xff\x88N}tb.", "tries to change a tensor"),
        (pickle.dumps(storage(1.0), 3)[2:-1] + b"N}\x86b.", "tries to change a tensor"),
        (b"\x96" + struct.pack("<Q", 1 << 40) + b".", "not a pickle .KeyError: 150"),
        (b"}" + ENDLESS + b"Ns.", "a key that is a tuple"),
        (b"}(" + ENDLESS + b"Nu.", "a key that is a tuple"),
        (b"(" + ENDLESS + b"Nd.", "a key that is a tuple"),
        (b"\x8f(" + ENDLESS + b"\x90.", "a key that is a tuple"),
        (b"(" + ENDLESS + b"\x91.", "a key that is a tuple"),
        (b"cbuiltins\nset\n(](" + ENDLESS + b"etR.", "a key that is a tuple"),
    ],
)
def test_opcodes_that_refuse_to_end(opcodes, message):
    with pytest.raises(CheckpointError, match=message):
        unpickle(b"\x80\x04" + opcodes)


def test_the_held_tensor_is_real():
    # Only what follows it is refused above.
    assert unpickle(b"\x80\x04" + HELD + b".").tensor.tolist() == [1.0]


def test_memo_index_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert unpickle(b"\x80\x04Nr" + struct.pack("<I", 1 << 27) + b".") is None
    # Kilobytes; the memo of pickle.Unpickler would take a million and more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def nested(depth: int = 40):
    both = []
    for _ in range(depth):
        both = [both, both]
    return both


def test_shared_parts_do_not_multiply():
    module = Network()
    for _ in range(40):
        outer = Network()
        outer.state = {"_modules": {"a": module, "b": module}}
        module = outer
    many = Network()
    many.state = {"_buffers": {str(i): Held(torch.zeros(1000)) for i in range(1000)}}
    for call in (
        lambda: _plain(nested(), Budget(10**5)),
        lambda: _plain(["x" * 1000] * 1000, Budget(10**5)),
        lambda: _state_dict(module, Budget(10**5)),
        lambda: _state_dict(many, Budget(10**5)),
    ):
        with pytest.raises(CheckpointError, match="repeats its parts until"):
            call()


def test_names_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04cos\nsys\x1b[2Jtem\n.")
    with pytest.raises(CheckpointError) as caught:
        fastgen.load_teacher(path)
    assert r"os.sys\x1b[2Jtem" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channel_base": 10**6, "channel_max": 10**6}, r"has shape .*, expected .*\d{5}"),
        ({"mapping_layers": 10**9}, "mapping_layers must be at most"),
        ({"plane_resolution": 2**3000}, "plane_resolution must be at most 1048576, got one of 3001 bits"),
    ],
)
def test_sizes_are_not_believed(tmp_path, small_config, change, message):
    path = tmp_path / "small.safetensors"
    checkpoint.save(path, "teacher", {"G": Teacher(**small_config)})
    header, tensors = checkpoint.read(path)
    header["G"]["config"] |= change
    checkpoint._write(path, header, tensors)
    with pytest.raises(CheckpointError, match=f"G does not fit Teacher: .*{message}"):
        fastgen.load_teacher(path)


def test_all_tensors_are_real_and_of_the_networks_types(tmp_path, small_config):
    path = tmp_path / "small.safetensors"
    checkpoint.save(path, "teacher", {"G": Teacher(**small_config)})
    header, tensors = checkpoint.read(path)
    # The released checkpoints of some shapes lack this constant.
    del tensors["G.superresolution.resample_filter"]
    checkpoint._write(path, header, {name: t.half() for name, t in tensors.items()})
    teacher = fastgen.load_teacher(path)
    for name, t in [*teacher.named_parameters(), *teacher.named_buffers()]:
        assert t.device.type == "cpu" and t.dtype == torch.float32, name
    constant = Teacher(**small_config).superresolution.resample_filter
    assert torch.equal(teacher.superresolution.resample_filter, constant)


def test_convert_wants_a_teacher_and_writes_nothing_else(tmp_path, small_config):
    source, target = tmp_path / "student.safetensors", tmp_path / "x.safetensors"
    student = Student.from_teacher(Teacher(**small_config), "toy")
    checkpoint.save(source, "student", {"G": student})
    with pytest.raises(CheckpointError, match="it holds a student, expected a teacher"):
        checkpoint.convert(source, target)
    header, tensors = checkpoint.read(source)
    for change, message in (
        ({"kind": "teacher"}, "G is a 'Student', expected Teacher"),
        ({"kind": "teacher", "G": "x"}, "G is a 'str', expected Teacher"),
    ):
        checkpoint._write(source, header | change, tensors)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.convert(source, target)
    assert not target.exists()


def test_another_discriminator_is_noted(tmp_path, original):
    source, target = tmp_path / "other.pkl", tmp_path / "x.safetensors"
    source.write_bytes(original.read_bytes().replace(b"DualDiscriminator", b"WildDiscriminator"))
    header = checkpoint.convert(source, target)
    assert header["D"] is None
    assert header["discriminator_note"].startswith("D is a 'WildDiscriminator', not a 'DualDiscriminator'")
    assert fastgen.load_discriminator(target) is None


def test_files_have_the_usual_mode(tmp_path, small_config):
    checkpoint.save(tmp_path / "a.safetensors", "teacher", {"G": Teacher(**small_config)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_source_in_the_file_does_not_run(tmp_path, victim, original):
    source = b"# source of training.triplane withheld"
    data = original.read_bytes()
    assert source in data
    path = tmp_path / "source.pkl"
    path.write_bytes(data.replace(source, b"open('ran', 'w').write('x')".ljust(len(source))))
    teacher, expected = fastgen.load_teacher(path), fastgen.load_teacher(original)
    for name, value in expected.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name


def test_source_of_a_class_that_is_not_known_is_refused_with_it(tmp_path, victim, original):
    source = b"# source of training.triplane withheld"
    data = original.read_bytes().replace(source, b"open('ran', 'w').write('x')".ljust(len(source)))
    path = tmp_path / "evil.pkl"
    path.write_bytes(data.replace(b"TriPlaneGenerator", b"FileWriterOnLoad_"))
    with pytest.raises(CheckpointError, match="G_ema is a FileWriterOnLoad_, expected a TriPlaneGenerator"):
        fastgen.load_teacher(path)


def test_another_network(tmp_path, original):
    path = tmp_path / "other.pkl"
    path.write_bytes(original.read_bytes().replace(b"TriPlaneGenerator", b"StyleGAN2Unedited"))
    with pytest.raises(CheckpointError, match="G_ema is a StyleGAN2Unedited, expected a TriPlaneGenerator"):
        fastgen.load_teacher(path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_truncated_pickle(tmp_path, original, share):
    data = original.read_bytes()
    path = tmp_path / "short.pkl"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="truncated or not a pickle"):
        fastgen.load_teacher(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is a plain text file\n",
        pickle.dumps({"G_ema": 1}, 0),
        torch_file({"a": 1}),
        b"\xfd7zXZ\x00",
    ],
)
def test_files_of_other_kinds(tmp_path, data):
    path = tmp_path / "other.pkl"
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match="neither a fastgen file nor an original pickle; it begins with b"
    ):
        fastgen.load_teacher(path)


@pytest.mark.parametrize("load", [fastgen.load_teacher, fastgen.load_student, fastgen.load_discriminator])
def test_missing_file(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such checkpoint file"):
        load(tmp_path / "nothing.safetensors")


def test_foreign_and_damaged_safetensors(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="a safetensors file without fastgen's header"):
        fastgen.load_teacher(path)
    save_file({"weight": torch.zeros(3)}, path, metadata={"fastgen": '{"kind": "dog"}'})
    with pytest.raises(CheckpointError, match="a header of unknown kind"):
        fastgen.load_teacher(path)
    path.write_bytes(struct.pack("<Q", 20) + b"{" + b"x" * 40)
    with pytest.raises(CheckpointError, match="a damaged safetensors file"):
        fastgen.load_teacher(path)


def test_convert(tmp_path, original):
    target = tmp_path / "new" / "cars.safetensors"
    header = checkpoint.convert(original, target)
    assert header["kind"] == "teacher" and header["plane_axes"] == "eg3d"
    assert header["source_sha256"] == hashlib.sha256(original.read_bytes()).hexdigest()
    assert checkpoint.read(target)[0] == header
    assert [p.name for p in target.parent.iterdir()] == ["cars.safetensors"]

    read, want = checkpoint.read(target)[1], checkpoint.read(original)[1]
    assert read.keys() == want.keys() and all(torch.equal(read[name], want[name]) for name in want)
    for load in (fastgen.load_teacher, fastgen.load_discriminator):
        new, old = load(target), load(original)
        assert new.config == old.config
        assert not new.training and not any(p.requires_grad for p in new.parameters())
        for name, value in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], value), name
    assert fastgen.load_teacher(target).camera.radius == 1.7


def test_original_settings(original):
    config = checkpoint.read(original)[0]["G"]["config"]
    assert config["neural_rendering_resolution"] == 64
    assert config["superresolution"] == "SuperresolutionHybrid2X"
    assert config["rendering_kwargs"]["c_gen_conditioning_zero"] is True
    assert (config["mapping_layers"], config["channel_base"], config["channel_max"]) == (2, 1024, 16)


@pytest.mark.parametrize(
    "third, name", [([[0, 0, 1], [1, 0, 0], [0, 1, 0]], "eg3d"), ([[0, 0, 1], [0, 1, 0], [1, 0, 0]], "fixed")]
)
def test_plane_axes(third, name):
    record, renderer = Network(), Record()
    record.state = {"_modules": {"renderer": renderer}}
    first, second = [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    axes = torch.tensor([first, second, third], dtype=torch.float32)
    renderer.state = {"plane_axes": Held(axes)}
    assert _plane_axes(record) == name
    axes[0] *= 2
    with pytest.raises(CheckpointError, match="plane axes .*expected those of 'eg3d' or 'fixed'"):
        _plane_axes(record)


def test_save_and_load(tmp_path, small_config):
    path = tmp_path / "small.safetensors"
    teacher, d = (
        Teacher(**small_config),
        DualDiscriminator(img_resolution=128, channel_base=128, channel_max=8),
    )
    teacher.camera = CameraDistribution(azimuth_spread=0.8, kind="uniform")
    checkpoint.save(path, "teacher", {"G": teacher, "D": d}, {"note": "seen"})
    assert checkpoint.read(path)[0]["note"] == "seen"
    loaded = fastgen.load_teacher(path)
    assert loaded.camera == teacher.camera
    for new, old in ((loaded, teacher), (fastgen.load_discriminator(path), d)):
        for name, value in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], value), name
    checkpoint.save(path, "teacher", {"G": teacher})
    assert fastgen.load_discriminator(path) is None
    with pytest.raises(CheckpointError, match="it holds a teacher, expected a student"):
        fastgen.load_student(path)


def test_tensors_that_do_not_fit(tmp_path, small_config):
    path = tmp_path / "small.safetensors"
    checkpoint.save(path, "teacher", {"G": Teacher(**small_config)})
    header, tensors = checkpoint.read(path)
    del tensors["G.decoder.net.0.bias"]
    checkpoint._write(path, header, tensors)
    with pytest.raises(CheckpointError, match=r"missing or unknown tensors: \['decoder.net.0.bias'\]"):
        fastgen.load_teacher(path)
    header["G"]["config"]["decoder_hidden"] = 17
    checkpoint._write(path, header, tensors)
    with pytest.raises(CheckpointError, match="G does not fit Teacher"):
        fastgen.load_teacher(path)
    header["G"]["class"] = "Popen"
    checkpoint._write(path, header, tensors)
    with pytest.raises(CheckpointError, match="G is a 'Popen', expected Teacher"):
        fastgen.load_teacher(path)


def test_loading_leaves_the_random_state(original):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fastgen.load_teacher(original)
    assert torch.equal(torch.get_rng_state(), before)
