"""Cluster files: what a stage gets of a machine, and the job scripts, each of which bash and shellcheck read."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from toys import choir, spring

from cordee import batch, cluster, plan, recipe, yaml12
from cordee.artifact import Store
from cordee.cluster import Cluster
from cordee.config import PRECISION, Config, Precision
from cordee.errors import UserError
from cordee.resources import Resources, seconds

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
ODD = {
    "account": "my project's",
    "modules": ["gcc/13.2.0", "cuda"],
    "setup": ["source ~/venv/bin/activate", "ulimit -c 0"],
    "environment": {"QUOTED": 'it\'s "two words" & more #1', "SPACE": " "},
    "options": ["--exclusive", "--constraint=a100&nvlink"],
    "srun": ["--cpu-bind=ldoms", "--mem-bind=local"],
    "cache": "/data/${USER}/cache",
}
CONTAINERS = [
    None,
    {"kind": "pyxis", "image": "registry#owner/image:tag", "mounts": ["/data:/data"]},
    {"kind": "apptainer", "image": "/images/my image.sif", "mounts": ["/data:/data"], "python": "/opt/venv/bin/python"},
    {"kind": "edf", "image": "/home/me/.edf/cordee.toml"},
]
STAGES = """
name: many
stages:
  spring: {uses: toys.spring}
  solo:   {uses: toys.choir, resources: {gpus: 1, time: "1-00:00:00"}}
  duet:   {uses: toys.choir, launch: {num_processes: 2}, resources: {cores: 3, memory_gb: 7.5}}
  octet:  {uses: toys.choir, launch: {num_processes: 8}}
  pool:   {uses: toys.spring, source: $spring/line.txt}
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_cluster_file_is_one(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = cluster.load(path.stem)
    assert told == cluster.load(str(path))
    assert told.model_fields_set == set(yaml12.read(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: slrum", "c.yaml: kind: Input should be 'local' or 'slurm', not 'slrum'"),
        ("kind: slurm\npartion: gpu", "c.yaml: partion: unknown key; did you mean 'partition'?"),
        ("kind: slurm\ncontainer: {kind: pyxis}", "c.yaml: container.image: missing"),
        (
            "kind: slurm\naccount: $PROJECT",
            "c.yaml: account: '$PROJECT' holds a shell variable, which nothing would expand",
        ),
        ('kind: slurm\ntime_limit: "12:00"', "c.yaml: time_limit: '12:00' is no time limit; write HH:MM:SS"),
        ("kind: slurm\ntemplate: mine.jinja", "c.yaml: template: no file 'mine.jinja'"),
        ("kind: slurm\nenvironment: {a-b: c}", "c.yaml: environment: 'a-b' is no name of a variable"),
        ('kind: slurm\nsetup: ["a\\nb"]', "c.yaml: setup.0: must be one line"),
    ],
)
def test_a_wrong_cluster_file_is_one_line(write, monkeypatch, tmp_path, text, said):
    write("c.yaml", text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        cluster.load("c.yaml")
    assert str(error.value).startswith(said)


def test_a_token_in_a_cluster_file_is_refused_and_not_repeated(write):
    path = write("three.yaml", "kind: slurm\nenvironment: {HF_TOKEN: hf_abcdefghijklmnopqrstuvwxyz012345}\n")
    with pytest.raises(UserError, match=r"environment\.HF_TOKEN: holds what looks like a token") as caught:
        cluster.load(str(path))
    assert "hf_a" not in str(caught.value)


def test_a_cluster_file_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"--cluster: no cluster file .*; did you mean 'slurm'\?"):
        cluster.load("slrum")


def test_a_stage_gets_the_share_of_its_gpus_and_several_nodes_where_it_needs_them():
    on = Cluster(kind="slurm", gpus_per_node=4, cores_per_node=64, memory_gb_per_node=400)

    def needs(processes, **told):
        config = choir.Config.model_validate({"launch": {"num_processes": processes}})
        found = on.needs(config, Resources(**told), ("r.yaml", "stages.choir"))
        return found.nodes, found.gpus, found.cores, found.memory_gb, found.time

    assert needs(1) == (1, 1, 16, 100, "24:00:00")
    assert needs(4) == (1, 4, 64, 400, "24:00:00")
    assert needs(16, time="00:30:00", cores=8) == (4, 4, 8, 400, "00:30:00")
    without = on.needs(spring.Config(), Resources(), ("r.yaml", "stages.spring"))
    assert (without.nodes, without.gpus, without.cores) == (1, 0, 64)
    for processes, told, said in [
        (6, {"gpus": 6}, None),
        (7, {}, "stages.choir.launch.num_processes: 7 processes can't be divided among 2 nodes of 4; 6 would do"),
        (1, {"gpus": 5}, "stages.choir.resources.gpus: 5 are asked of each node, which has 4"),
        (1, {"cores": 65}, "stages.choir.resources.cores: 65 are asked of each node, which has 64"),
        (1, {"time": "00:05:00"}, "stages.choir.resources.time: 00:05:00 is no time to work in"),
    ]:
        if said is None:
            assert needs(processes, **told)[:2] == (2, 3)
            continue
        with pytest.raises(UserError, match=re.escape(said)):
            needs(processes, **told)


def test_what_a_stage_needs_is_no_part_of_its_identity(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for text in (STAGES, re.sub(r", resources: \{.*?\}", "", STAGES)):
        made = plan.make(recipe.load(write("many.yaml", text)), Store(tmp_path / "runs"))
        found.append([(one.name, one.fingerprint) for one in made.stages])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{gpu: 1}", "stages.spring.resources.gpu: unknown key; did you mean 'gpus'?"),
        ("{time: 5}", "stages.spring.resources.time: Input should be a valid string"),
        ('{time: "0:00:00"}', "stages.spring.resources.time: '0:00:00' is no time limit"),
        ("4", "stages.spring.resources: must be a mapping"),
    ],
)
def test_wrong_resources_are_one_line(write, given, said):
    file = write("r.yaml", f"name: r\nstages: {{spring: {{uses: toys.spring, resources: {given}}}}}")
    with pytest.raises(UserError, match=re.escape(said)):
        recipe.load(file)


def test_seconds_of_a_time_limit():
    assert [seconds(text) for text in ("00:00:01", "12:34:56", "2-00:00:00")] == [1, 45296, 172800]


class Computes(Config):
    """What a stage with these keys is told."""

    precision: Precision = "auto"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_auto_means_what_the_cluster_computes_in(write, monkeypatch, precision):
    """The login node may be another kind of machine: the plan there and in the job is the same."""
    told = cluster.load(str(write("c.yaml", f"kind: slurm\nprecision: {precision}\nenvironment: {{A: b}}"))).variables()
    assert told == {"A": "b", PRECISION: precision}
    monkeypatch.setenv(PRECISION, told[PRECISION])
    assert Computes().precision == precision


def rendered(folder: Path, on: Cluster, of: plan.Plan) -> list[Path]:
    """The scripts of all stages of a plan."""
    written = batch.submit(of, on, dry_run=True)
    assert {one.number for one in written} == {None}
    assert [one.script.parent for one in written] == [folder / of.recipe.name / "logs"] * len(written)
    return [one.script for one in written]


def require_right(scripts: list[Path]) -> None:
    """See that bash and shellcheck find nothing, and that no #SBATCH line holds what a shell would expand."""
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
        text = script.read_text()
        head, _, body = text.partition("\nset -eo pipefail\n")
        assert [line for line in head.splitlines() if not line.startswith("#")] == []
        assert "#SBATCH" not in body
        assert not re.search(r"#SBATCH.*[$`]", text)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: only bash has read the scripts")
    # SC1090, SC1091: a file that `setup` reads is another's
    checked = subprocess.run(
        ["shellcheck", "--exclude=SC1090,SC1091", *scripts], capture_output=True, text=True, check=False
    )
    assert checked.stdout == ""


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda one: one["kind"] if one else "bare")
@pytest.mark.parametrize("gpus", [0, 4])
@pytest.mark.parametrize("is_odd", [False, True], ids=["plain", "odd"])
def test_every_job_script_is_one_that_bash_and_shellcheck_read(write, tmp_path, monkeypatch, container, gpus, is_odd):
    folder = tmp_path / "it's 100% mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("USER", "me")
    given = {"kind": "slurm", "gpus_per_node": gpus, "container": container, **(ODD if is_odd else {})}
    on = Cluster.model_validate(given | ({} if gpus else {"processes_per_node": 4}))
    text = STAGES if gpus else STAGES.replace("gpus: 1, ", "")
    scripts = rendered(folder / "runs", on, plan.make(recipe.load(write("many.yaml", text)), Store(folder / "runs")))
    assert len(scripts) == 5
    require_right(scripts)
    octet = next(script for script in scripts if ".octet." in script.name).read_text()
    assert "#SBATCH --nodes=2\n" in octet
    assert ("#SBATCH --gpus-per-node=4\n" in octet) == bool(gpus)
    assert "srun" not in octet.partition("\npid=")[0].partition("\ncd ")[2], "on several nodes the runner calls srun"


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED if cluster.load(str(path)).kind == "slurm"])
def test_the_shipped_clusters_render_the_quickstart(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    overrides = ["base.launch.num_processes=8", "base.per_device_train_batch_size=1"]
    of = plan.make(recipe.load(ROOT / "configs/recipes/quickstart.yaml", overrides), Store(tmp_path / "runs"))
    scripts = rendered(tmp_path / "runs", cluster.load(name), of)
    assert len(scripts) == len(of.stages)
    require_right(scripts)


def test_a_job_is_told_its_restarts_and_slurm_decides_how_many_run_at_once(cordee, write, tmp_path):
    on = write("three.yaml", "kind: slurm\npartition: all\n")
    recipe_file = write("brook.yaml", "name: brook\nstages: {spring: {uses: toys.spring}}\n")
    given = ("run", recipe_file, "--cluster", on, "--dry-run", "--runs", tmp_path / "runs")
    assert cordee(*given, "--restarts", "7").returncode == 0
    (script,) = (tmp_path / "runs/brook/logs").glob("*.spring.sbatch")
    assert "--restarts 7" in " ".join(script.read_text().split("\\\n")).replace("  ", " ")
    refused = cordee(*given, "--jobs", "2")
    assert refused.returncode == 2
    assert refused.stderr == "cordee: --jobs: is for one machine; Slurm decides how many jobs run at once\n"


def test_a_template_of_a_sites_own_takes_the_place_of_ours(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = write("mine.jinja", "#!/bin/bash\n{% for o in options %}\n#SBATCH {{ o }}\n{% endfor %}\n{{ stage }}\n")
    on = Cluster.model_validate({"kind": "slurm", "template": str(template), "processes_per_node": 4})
    text = STAGES.replace("gpus: 1, ", "")
    of = plan.make(recipe.load(write("many.yaml", text)), Store(tmp_path / "runs"))
    first = rendered(tmp_path / "runs", on, of)[0].read_text()
    assert first.startswith("#!/bin/bash\n#SBATCH --job-name=many-spring\n")
    assert first.endswith("\nspring\n")


def test_a_path_of_a_variable_that_is_not_set_is_an_error():
    assert cluster.expanded("$A/${B}/c", {"A": "/a", "B": "b"}) == Path("/a/b/c")
    with pytest.raises(UserError, match=r"--cluster: '\$A/runs': \$A is not set here"):
        cluster.expanded("$A/runs", {})
