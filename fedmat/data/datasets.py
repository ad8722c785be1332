"""The public datasets fedmat's examples use, as one literal table: publisher, licence, paper, files and their digests.

Knows: where each published file is (repository, commit, path), its SHA-256, and which files have no publisher because this
project derived them. Refuses to know: how files are fetched, and what they mean.

References:
    The paper of each dataset is its ``Dataset.paper``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One file as it lies in the dataset's folder.

    Attributes:
        name: file name here.
        sha256: of the file as it lies here.
        size: bytes as it lies here.
        path: path in the publisher's repository.
        elsewhere: (commit, path) to try when it is not at ``path``; the digest decides what is accepted.
        sheet: the publisher has a workbook: its first sheet without its first (index) column is the file.
    """

    name: str
    sha256: str
    size: int
    path: str
    elsewhere: tuple[tuple[str, str], ...] = ()
    sheet: bool = False


@dataclass(frozen=True)
class Dataset:
    """A public dataset: who publishes it, under which licence, and what this project made of it.

    Attributes:
        derived: files that this project derived: they have no publisher and cannot be downloaded.
    """

    name: str
    about: str
    repository: str
    commit: str
    licence: str
    paper: str
    files: tuple[Published, ...] = ()
    derived: tuple[str, ...] = ()


DATASETS: Mapping[str, Dataset] = {
    d.name: d
    for d in (
        Dataset(
            "calisol23",
            "conductivity of 13,825 liquid electrolytes from 27 laboratories",
            "Kyeongbin-Tom/calisol23-ionic-conductivity",
            "4f7ac3b0b2203f1c3e9138a891d6456541d5bb87",
            "CC BY 4.0",
            "CALiSol-23, Sci. Data 11 (2024), doi:10.1038/s41597-024-03575-8",
            (
                Published(
                    "calisol23.csv",
                    "2ef57814c086316ec2d1c583ea5e58e57832185a8b39a2ce0c7fc77f25e566c6",
                    2796946,
                    "data/calisol23.xlsx",
                    elsewhere=(
                        ("4f7ac3b0b2203f1c3e9138a891d6456541d5bb87", "calisol23.xlsx"),
                        ("44bc54ed715448f9f0149e292db20cde9a020f79", "calisol23.xlsx"),
                    ),
                    sheet=True,
                ),
            ),
        ),
        Dataset(
            "obelix",
            "room-temperature conductivity of 599 solid electrolytes, 321 with crystal structures",
            "NRC-Mila/OBELiX",
            "4eaac889809dd489e3bae468c45d5c0e02b9147a",
            "CC BY 4.0",
            "Therrien et al., arXiv:2502.14234 (2025)",
            (
                Published(
                    "all.csv",
                    "54f6265ef84d16a919d08c6815f14b0fd7465fa00090bee2511c16c042e57f3c",
                    114856,
                    "data/downloads/all.csv",
                ),
                Published(
                    "train.csv",
                    "01d87779862807e24bc45bb2c759852f892390b99f9340f13906c54805aa8776",
                    91889,
                    "data/downloads/train.csv",
                ),
                Published(
                    "test.csv",
                    "b2c266eb74e22f403743d52959bea7c43b1531a850994870a70dd909200e5297",
                    23220,
                    "data/downloads/test.csv",
                ),
                Published(
                    "all_cifs.tar.gz",
                    "bfa2a3c92e3b8ca1b9859992e686c9e19f98924e7ff369c05db7006548217d49",
                    106813,
                    "data/downloads/all_cifs.tar.gz",
                ),
                Published(
                    "train_cifs.tar.gz",
                    "0c461b79d3650e68228f2b921d1b9b58944dcbe470eeffcf85653748c13ce19e",
                    54532,
                    "data/downloads/train_cifs.tar.gz",
                ),
                Published(
                    "test_cifs.tar.gz",
                    "26697dd885b54dce6f7be6e0fcadc29678c75e63a277cb78e1f8341b22a6c6f9",
                    17780,
                    "data/downloads/test_cifs.tar.gz",
                ),
            ),
            derived=("derived_xrd_sim_CuKa_10_80_0p1.npz",),
        ),
        Dataset(
            "liion_liverpool",
            "820 conductivities of lithium-ion solids at many temperatures",
            "NRC-Mila/OBELiX",
            "4eaac889809dd489e3bae468c45d5c0e02b9147a",
            "CC BY 4.0 where redistributed; the Liverpool site's own terms were not found",
            "Hargreaves et al., npj Comput. Mater. 9, 9 (2023), doi:10.1038/s41524-022-00951-z",
            (
                Published(
                    "LiIonDatabase.csv",
                    "d24ed972b88c3aba14194b6f9347fb3c8e8f9249b82fec22d961e709c1c06e5d",
                    75093,
                    "data/misc/LiIonDatabase.csv",
                ),
            ),
            derived=("LiIonDatabase_clean.csv",),
        ),
        Dataset(
            "mpea",
            "mechanical properties of 1,545 multi-principal element alloys",
            "CitrineInformatics/MPEA_dataset",
            "d31e2510cccc3fb9e79d43ad62652f64ef8c2c5e",
            "Apache-2.0",
            "Borg et al., Sci. Data 7, 430 (2020)",
            (
                Published(
                    "MPEA_dataset.csv",
                    "c5504d93fd324d1be26cf814d0694ee9ee95578d68a0b38aba6813b939fa2c5d",
                    332126,
                    "MPEA_dataset.csv",
                ),
                Published(
                    "references.csv",
                    "54601f6302088769b8320d7d318053903b0976901050e63a13cc9ae91e41e991",
                    49840,
                    "references/references.csv",
                ),
            ),
        ),
        Dataset(
            "polymer_electrolyte",
            "10,114 conductivities of polymer electrolytes",
            "learningmatter-mit/Chem-prop-pred",
            "39b0c16f70c4142b32a67531a093718c767ad43d",
            "MIT",
            "Bradford, Lopez et al., ACS Cent. Sci. 9, 206 (2023), doi:10.1021/acscentsci.2c01123",
            (
                Published(
                    "clean_train_data.csv",
                    "6b6de5979e2b0fe592e9c75b98cdccc6a77c579bd9332e3633301f6f6392ca74",
                    1124553,
                    "data/clean_train_data.csv",
                ),
            ),
        ),
        Dataset(
            "matbench_composition",
            "six Matbench v0.1 tasks as composition tables in the official row order",
            "anthony-wang/CrabNet",
            "457b4d4835737ecbe4dd33e53174bd818bd82143",
            "repository MIT; Materials Project data CC BY 4.0",
            "Dunn et al., npj Comput. Mater. 6, 138 (2020), doi:10.1038/s41524-020-00406-3",
            tuple(
                Published(name, digest, size, f"data/matbench/{path}")
                for name, digest, size, path in (
                    (
                        "castelli.csv",
                        "2aba6ff55450b269056de0e07362bd279d32abc8e4af04ca0100ecbb3e62bb97",
                        288969,
                        "castelli.csv",
                    ),
                    (
                        "dielectric.csv",
                        "6320d3da4c0f68e9248e26c058bf047b71f43ec687a6db6faf4f7bc4f4f21c9e",
                        132927,
                        "dielectric.csv",
                    ),
                    (
                        "elasticity_log10_G_VRH_.csv",
                        "6eda504f98a3b98308bb4f1353810f2703475daa85540b15aebe1fedf313304a",
                        296676,
                        "elasticity_log10(G_VRH).csv",
                    ),
                    (
                        "elasticity_log10_K_VRH_.csv",
                        "b4e2620ca797b9eca83a6633d4b94dc3ae047bba3f0eacd5cdb446a75d07d087",
                        296929,
                        "elasticity_log10(K_VRH).csv",
                    ),
                    ("jdft2d.csv", "96e89a27ba23662de1fed19faaf577db45fd1a3b160d149b556e9d6a348a3056", 16270, "jdft2d.csv"),
                    ("phonons.csv", "09108e3cbfead13edc0c18e66ca015cef28f7431fcc822038bc7b5ecc5d6222b", 34070, "phonons.csv"),
                )
            ),
        ),
        Dataset(
            "perov5_structures",
            "7,572 cubic perovskites with structures (validation and test parts of Perov-5)",
            "txie-93/cdvae",
            "f857f598d6f6cca5dc1ea0582d228f12dcc2c2ea",
            "repository MIT; terms of the Computational Materials Repository not stated there",
            "Castelli et al., Energy Environ. Sci. 5, 5814 and 9034 (2012); Xie et al., ICLR 2022",
            (
                Published(
                    "perov5_val.csv",
                    "326f401219901270374b71e2faff63df3a29a99fd26f469993b9f476b693daf2",
                    3673814,
                    "data/perov_5/val.csv",
                ),
                Published(
                    "perov5_test.csv",
                    "a85878c685037f0a578257f6d4fcdde00e968dbab73c5f1e90ecef65218513f6",
                    3671842,
                    "data/perov_5/test.csv",
                ),
            ),
            derived=("matbench_row_map.csv", "derived_xrd_sim_CuKa_10_80_0p2.npz"),
        ),
        Dataset(
            "battery_severson",
            "cycle life of 124 fast-charged cells",
            "petermattia/revisit-severson-et-al",
            "3a77c7d513126e921896315038d0f8f2645e440d",
            "repository MIT; terms of data.matr.io not verified",
            "Severson et al., Nat. Energy 4, 383 (2019); Attia et al., J. Electrochem. Soc. 168, 090547 (2021)",
            (
                Published(
                    "severson_SI_table9_policies.csv",
                    "34be34f86521c12daf0bbb962dca0bd3bd65089b7bc8bcea85f84480e6fd3cb3",
                    6253,
                    "lifetime_charging_time/severson_et_al_SI_table9.csv",
                ),
            ),
            derived=("features_100cycles.csv", "qdv_cycles2_100_v100.npz"),
        ),
        Dataset(
            "xrd_perovskite",
            "85 measured diffraction patterns of metal halide films, resampled to one grid",
            "PV-Lab/autoXRD",
            "2fc398059ff16a5cab67b0afcbc69f68748586b8",
            "Apache-2.0",
            "Oviedo et al., npj Comput. Mater. 5, 60 (2019)",
            derived=("xrd_exp_10_50deg.csv.gz",),
        ),
        Dataset(
            "mp_elastic_structures_join",
            "1,146 elastic moduli joined to Materials Project structures",
            "anthony-wang/CrabNet, aimat-lab/3DSC",
            "457b4d4835737ecbe4dd33e53174bd818bd82143",
            "CC BY 4.0",
            "de Jong et al., Sci. Data 2, 150009 (2015)",
            derived=("elastic_structures.csv.gz",),
        ),
        Dataset(
            "consortia",
            "which row of which dataset belongs to which simulated site and split",
            "",
            "",
            "inherits each source's",
            "",
            derived=(
                "C1_solid_electrolyte.csv",
                "C2_alloys.csv",
                "C4a_liquid_electrolyte_sites.csv",
                "C4b_polymer_electrolyte_sites.csv",
                "C6_battery_sites.csv",
            ),
        ),
    )
}
