"""The folder that quantize writes: whole files only, and a state file by which an interrupted run goes on where it was."""

import errno
import json
import os
import re
import shutil

from ref.layouts.checkpoint import CONFIG_FILES, INDEX, PICKLED, header, read_json

STATE = "quantize.json"
# Where files are that are not complete, also those that safetensors makes by names of its own.
PARTS = "quantize.parts"
# Weights in other forms, and what describes them: not copied beside the new ones.
WEIGHTS = (*PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".index.json")


class Output:
    """A folder that this program writes, alone.

    Begun by a first run with its state: a dict of JSON that says all that the result depends on. Files come under their own names when they
    are complete; config.json is the last, and then the state goes.
    """

    def __init__(self, folder, state):
        """
        Raises:
            ValueError: the folder is that of the source, holds something else or another run's, or another process writes there.
            OSError: it cannot be made.
        """
        self.folder, self.state = folder, json.loads(json.dumps(state))
        path = os.path.join(folder, STATE)
        if os.path.realpath(folder) == state["source"]:
            raise ValueError(f"{folder}: is where the source is, expected another folder")
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise ValueError(f"{folder}: is no directory")
        there = sorted(set(os.listdir(folder)) - {PARTS}) if os.path.isdir(folder) else []
        if there and STATE not in there:
            raise ValueError(f"{folder}: holds {there[0]} and nothing of an interrupted run; expected an empty folder, or none")
        if there:
            self._same(path)
        else:
            self.write(STATE, lambda part: _dump(part, self.state))
        self._lock(path)
        shutil.rmtree(os.path.join(folder, PARTS), ignore_errors=True)

    def _same(self, path):
        try:
            begun = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; expected the state of an interrupted run") from None
        for key, value in self.state.items():
            if begun.get(key) != value:
                was, now = (_shown(one) for one in _difference(begun.get(key), value))
                raise ValueError(
                    f"{self.folder}: was begun with another {key}: {was}, and now it is {now}; call it as it was begun, or take another folder"
                )

    def _lock(self, path):
        import fcntl

        # Writable, as locks on network file systems need it.
        self._locked = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(f"{self.folder}: another run is writing there") from None

    def has(self, file):
        """Whether a safetensors file is there.

        Raises:
            ValueError: it is broken, which this program leaves none.
        """
        path = os.path.join(self.folder, file)
        try:
            return os.path.exists(path) and bool(header(path)[0])
        except ValueError as error:
            raise ValueError(f"{error}; delete it to have it written anew") from None

    def write(self, file, save):
        """Write one file, by save(path), in another folder until it is complete and on the disk."""
        parts = os.path.join(self.folder, PARTS)
        part = os.path.join(parts, file)
        try:
            os.makedirs(parts, exist_ok=True)
            save(part)
            if file != STATE:  # safetensors lets only the owner read
                shutil.copymode(os.path.join(self.folder, STATE), part)
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(part, os.path.join(self.folder, file))
        except BaseException:
            shutil.rmtree(parts, ignore_errors=True)
            raise

    def finish(self, source, config, shards):
        """Write what goes with the shards: the source's other files, the index, config.json. Returns the names that were not copied."""
        left = []
        for file in sorted(os.listdir(source)):
            path = os.path.join(source, file)
            if not os.path.isfile(path):
                left.append(file + "/")
            elif not file.endswith(WEIGHTS) and file not in (*CONFIG_FILES, "config.json", STATE):
                self.write(file, lambda part, path=path: shutil.copyfile(path, part))
            elif not file.endswith((".safetensors", ".safetensors.index.json")) and file != "config.json":
                left.append(file)
        entries = {shard: header(os.path.join(self.folder, shard))[0] for shard in shards}
        if len(shards) > 1:
            offsets = [entry["data_offsets"] for of in entries.values() for entry in of.values()]
            index = {
                "metadata": {"total_size": sum(end - start for start, end in offsets)},
                "weight_map": {name: shard for shard, of in entries.items() for name in sorted(of)},
            }
            self.write(INDEX, lambda part: _dump(part, index))
        self.write("config.json", lambda part: _dump(part, config))
        os.rmdir(os.path.join(self.folder, PARTS))
        os.remove(os.path.join(self.folder, STATE))
        return left

    def close(self):
        """Let another process write here."""
        os.close(self._locked)


def save_tensors(tensors, path):
    """Write a safetensors file.

    Raises:
        OSError: as the system says, as ENOSPC where the disk is full. ValueError: as safetensors says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error ([0-9]+)", str(error))
        if code is None:
            raise ValueError(f"{path}: {error}") from None
        raise OSError(int(code[1]), os.strerror(int(code[1])), path) from None


def explain(error, folder):
    """What to do about an OSError, as a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {folder} is full; with more room, the same command goes on from here"
    return f"{error.filename or folder}: {error.strerror or error}; the same command goes on from here"


def _dump(path, document):
    with open(path, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")


def _difference(was, now):
    """Two values, where they are dicts only what differs."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return was, now
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return tuple({key: one[key] for key in keys if key in one} for one in (was, now))


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
