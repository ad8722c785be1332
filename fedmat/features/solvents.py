"""Solvents and salts of liquid electrolytes: structures and densities, each with its source.

Knows: names as battery papers write them. Refuses to know: mixtures and conductivity.

The names are those of CALiSol-23 (Scientific Data 11, 2024, doi:10.1038/s41597-024-03575-8), its spellings included, plus usual synonyms. Densities are approximate values in g/mL at 25 C unless the source column says otherwise; two digits after
the point are meaningful. They only convert between volume, weight and mole, where 2 % is far below the scatter between
laboratories. Source names: CRC = CRC Handbook of Chemistry and Physics (20 C values lowered by about 0.1 % per kelvin);
SA = Sigma-Aldrich product information; PubChem = compound record; Xu2004 = K. Xu, Chem. Rev. 104, 4303 (2004),
doi:10.1021/cr030203g, tables of electrolyte solvents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Solvent:
    """One solvent: SMILES, density in g/mL near 25 C, and where the density is from."""

    smiles: str
    density_g_ml: float
    source: str


SOLVENTS: Mapping[str, Solvent] = {
    "EC": Solvent("C1COC(=O)O1", 1.32, "Xu2004, liquid at 40 C (solid at 25 C)"),
    "PC": Solvent("CC1COC(=O)O1", 1.20, "Xu2004"),
    "DMC": Solvent("COC(=O)OC", 1.06, "Xu2004"),
    "EMC": Solvent("CCOC(=O)OC", 1.01, "Xu2004"),
    "DEC": Solvent("CCOC(=O)OCC", 0.97, "Xu2004"),
    "DME": Solvent("COCCOC", 0.86, "Xu2004"),
    "DMSO": Solvent("CS(C)=O", 1.10, "CRC"),
    "AN": Solvent("CC#N", 0.78, "CRC"),
    "MOEMC": Solvent("COCCOC(=O)OC", 1.08, "estimate between DMC and DME homologues; no handbook value found"),
    "TFP": Solvent("O=P(OCC(F)(F)F)(OCC(F)(F)F)OCC(F)(F)F", 1.59, "SA"),
    "EA": Solvent("CCOC(C)=O", 0.89, "CRC"),
    "MA": Solvent("COC(C)=O", 0.93, "CRC"),
    "FEC": Solvent("O=C1OCC(F)O1", 1.45, "SA"),
    "DOL": Solvent("C1COCO1", 1.06, "Xu2004"),
    "2-MeTHF": Solvent("CC1CCCO1", 0.85, "Xu2004"),
    "DMM": Solvent("COCOC", 0.86, "Xu2004"),
    "Freon 11": Solvent("FC(Cl)(Cl)Cl", 1.48, "CRC, near its boiling point of 24 C"),
    "Methylene chloride": Solvent("ClCCl", 1.32, "CRC"),
    "THF": Solvent("C1CCOC1", 0.88, "Xu2004"),
    "Toluene": Solvent("Cc1ccccc1", 0.86, "CRC"),
    "Sulfolane": Solvent("O=S1(=O)CCCC1", 1.26, "CRC, at 30 C (solid at 25 C)"),
    "2-Glyme": Solvent("COCCOCCOC", 0.94, "CRC"),
    "3-Glyme": Solvent("COCCOCCOCCOC", 0.98, "CRC"),
    "4-Glyme": Solvent("COCCOCCOCCOCCOC", 1.01, "SA"),
    "3-Me-2-Oxazolidinone": Solvent("CN1CCOC1=O", 1.17, "SA"),
    "3-MeSulfolane": Solvent("CC1CCS(=O)(=O)C1", 1.19, "SA"),
    "Ethyldiglyme": Solvent("CCOCCOCCOCC", 0.91, "SA"),
    "DMF": Solvent("CN(C)C=O", 0.94, "CRC"),
    "Ethylbenzene": Solvent("CCc1ccccc1", 0.86, "CRC"),
    "Ethylmonoglyme": Solvent("CCOCCOCC", 0.84, "SA"),
    "Benzene": Solvent("c1ccccc1", 0.87, "CRC"),
    "g-Butyrolactone": Solvent("O=C1CCCO1", 1.13, "CRC"),
    "Cumene": Solvent("CC(C)c1ccccc1", 0.86, "CRC"),
    "Propylsulfone": Solvent("CCCS(=O)(=O)CCC", 1.03, "CRC, near 50 C (melts at 29 C)"),
    "Pseudocumeme": Solvent("Cc1ccc(C)c(C)c1", 0.87, "CRC"),
    "TEOS": Solvent("CCO[Si](OCC)(OCC)OCC", 0.93, "SA"),
    "m-Xylene": Solvent("Cc1cccc(C)c1", 0.86, "CRC"),
    "o-Xylene": Solvent("Cc1ccccc1C", 0.88, "CRC"),
}

SALTS: Mapping[str, str] = {
    "LiPF6": "[Li+].F[P-](F)(F)(F)(F)F",
    "LiBF4": "[Li+].F[B-](F)(F)F",
    "LiAsF6": "[Li+].F[As-](F)(F)(F)(F)F",
    "LiClO4": "[Li+].[O-]Cl(=O)(=O)=O",
    "LiTFSI": "[Li+].O=S(=O)([N-]S(=O)(=O)C(F)(F)F)C(F)(F)F",
    "LiN(CF3SO2)2": "[Li+].O=S(=O)([N-]S(=O)(=O)C(F)(F)F)C(F)(F)F",
    "LiFSI": "[Li+].O=S(=O)(F)[N-]S(=O)(=O)F",
    "LiCF3SO3": "[Li+].[O-]S(=O)(=O)C(F)(F)F",
    "LiBOB": "[Li+].O=C1O[B-]2(OC1=O)OC(=O)C(=O)O2",
    "LiBMB": "[Li+].O=C1CC(=O)O[B-]2(O1)OC(=O)CC(=O)O2",
    "LiBPFPB": "[Li+].FC(F)(F)C1(C(F)(F)F)O[B-]2(OC1(C(F)(F)F)C(F)(F)F)OC(C(F)(F)F)(C(F)(F)F)C(O2)(C(F)(F)F)C(F)(F)F",
    "LiPDI": "[Li+].N#Cc1nc(C(F)(F)C(F)(F)F)[n-]c1C#N",
    "LiTDI": "[Li+].N#Cc1nc(C(F)(F)F)[n-]c1C#N",
    "LiDFOB": "[Li+].O=C1O[B-](F)(F)OC1=O",
}

SYNONYMS: Mapping[str, str] = {
    "GBL": "g-Butyrolactone",
    "gamma-Butyrolactone": "g-Butyrolactone",
    "Pseudocumene": "Pseudocumeme",
    "Dichloromethane": "Methylene chloride",
    "DCM": "Methylene chloride",
    "Acetonitrile": "AN",
    "Diglyme": "2-Glyme",
    "Triglyme": "3-Glyme",
    "Tetraglyme": "4-Glyme",
    "LiOTf": "LiCF3SO3",
    "LiTf": "LiCF3SO3",
}
