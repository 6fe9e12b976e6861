# SPDX-License-Identifier: Apache-2.0
"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graft.config.fields import WAVELET, BaseBias
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.kernels.transforms import Basis, Plain, Sparse, Wavelet
from graft.methods.spectral import Spectral, SpectralConfig

if TYPE_CHECKING:
    from graft.core.method import Method


@dataclass(kw_only=True)
class WaveFTConfig(SpectralConfig, BaseBias):
    """WaveFT: ΔW is the inverse wavelet transform of n coefficients, at places that a seed draws.

    Raises:
        ConfigError: an unknown wavelet, or a number of coefficients that is not positive.
    """

    peft_type: str = "WAVEFT"
    n_frequency: int = 2592  # n; at most the size of the weight
    scaling: float = 25.0
    wavelet_family: str = "db1"  # db1 to db10, sym2 to sym10, or coif1 to coif5
    use_idwt: bool = True  # False: the coefficients are entries of ΔW itself
    random_loc_seed: int = 777  # of the places, which no file holds
    proportional_parameters: bool = False  # layers share n times their number in proportion to their sizes
    init_weights: bool = True  # zeros, the identity; False: small random values

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError for an unknown `wavelet_family`; warn of coif4 and coif5, where PEFT's
        filters differ.
        """
        super().__post_init__()
        if self.wavelet_family not in LOW:
            raise ConfigError(
                f"Wavelet family {self.wavelet_family} not supported. Supported wavelet families are: {', '.join(LOW)}"
            )
        if self.wavelet_family in ("coif4", "coif5"):
            warn(
                f"PEFT 0.21.2 has other filters than those of {self.wavelet_family}: its files of that family compute "
                "something else here, and graft's there.",
                PeftWarning,
            )


_TABLE = """
db1: 0.7071067811865476 0.7071067811865476
db2: 0.48296291314453416 0.8365163037378079 0.2241438680420134 -0.12940952255126037
db3: 0.33267055295008263 0.8068915093110925 0.45987750211849154 -0.13501102001025458 -0.08544127388202666
 0.03522629188570953
db4: 0.2303778133088965 0.7148465705529157 0.6308807679298589 -0.02798376941685985 -0.18703481171909309
 0.03084138183556076 0.0328830116668852 -0.01059740178506903
db5: 0.16010239797419293 0.6038292697971896 0.7243085284377729 0.13842814590132074 -0.24229488706638203
 -0.03224486958463837 0.07757149384004572 -0.00624149021279827 -0.012580751999082 0.00333572528547377
db6: 0.11154074335010947 0.49462389039845306 0.7511339080210954 0.31525035170919763 -0.22626469396543983
 -0.12976686756726194 0.09750160558732304 0.02752286553030573 -0.03158203931748603 0.0005538422011615
 0.00477725751094551 -0.00107730108530848
db7: 0.07785205408500918 0.3965393194819173 0.7291320908462351 0.4697822874051931 -0.14390600392856498
 -0.22403618499387498 0.07130921926683026 0.08061260915108308 -0.03802993693501441 -0.01657454163066688
 0.01255099855609984 0.00042957797292137 -0.00180164070404749 0.00035371379997452
db8: 0.05441584224310401 0.31287159091429995 0.6756307362972898 0.5853546836542067 -0.01582910525634931
 -0.2840155429615469 0.00047248457391328 0.12874742662047847 -0.01736930100180755 -0.04408825393079475
 0.01398102791739828 0.00874609404740578 -0.00487035299345157 -0.00039174037337695 0.00067544940645057
 -0.00011747678412477
db9: 0.03807794736387834 0.24383467461259034 0.6048231236901112 0.6572880780513005 0.13319738582500756
 -0.2932737832791749 -0.09684078322297646 0.14854074933810638 0.03072568147933338 -0.06763282906132997
 0.00025094711483145 0.0223616621236791 -0.0047232047577514 -0.00428150368246343 0.00184764688305623
 0.0002303857635232 -0.00025196318894271 3.934732031627e-05
db10: 0.02667005790055555 0.1881768000776915 0.5272011889317256 0.6884590394536035 0.2811723436605775
 -0.24984642432731538 -0.19594627437737705 0.12736934033579325 0.09305736460357235 -0.07139414716639708
 -0.02945753682187581 0.033212674059341 0.00360655356695617 -0.01073317548333057 0.0013953517470529
 0.00199240529518506 -0.00068585669495971 -0.00011646685512929 9.358867032007e-05 -1.326420289452e-05
sym2: 0.48296291314469025 0.836516303737469 0.22414386804185735 -0.12940952255092145
sym3: 0.3326705529509569 0.8068915093133388 0.4598775021193313 -0.13501102001039084 -0.08544127388224149
 0.03522629188210066
sym4: 0.0322231006040427 -0.01260396726203783 -0.09921954357684722 0.29785779560527736 0.8037387518059161
 0.49761866763201545 -0.02963552764599851 -0.07576571478927333
sym5: 0.01953888273528673 -0.02110183402475885 -0.17532808990845047 0.01660210576452232 0.6339789634582119
 0.7234076904024206 0.1993975339773936 -0.03913424930238309 0.02951949092577464 0.02733306834507798
sym6: -0.00780070832503415 0.0017677118642428 0.04472490177066578 -0.02106029251230056 -0.07263752278646252
 0.3379294217276218 0.787641141030194 0.4910559419267466 -0.048311742585633 -0.11799011114819057 0.00349071208421747
 0.01540410932702737
sym7: 0.01026817670851126 0.00401024487153366 -0.10780823770381774 -0.14004724044296152 0.2886296317515146
 0.767764317003164 0.5361019170917628 0.01744125508685583 -0.04955283493712725 0.0678926935013727 0.03051551316596357
 -0.01263630340325193 -0.00104738488868292 0.00268181456825788
sym8: 0.00188995033275946 -0.00030292051472137 -0.01495225833704823 0.00380875201389062 0.04913717967360751
 -0.027219029917056 -0.05194583810770904 0.3644418948353314 0.7771857517005235 0.4813596512583722 -0.06127335906765852
 -0.1432942383508097 0.00760748732491761 0.03169508781149298 -0.00054213233179115 -0.00338241595100613
sym9: 0.00106949003290861 -0.00047315449868008 -0.01026406402763314 0.00885926749340048 0.06207778930288603
 -0.01823377077939599 -0.19155083129728512 0.03527248803527189 0.6173384491409358 0.717897082764412 0.238760914607303
 -0.05456895843083407 0.00058346274612581 0.03022487885827568 -0.01152821020767923 -0.01327196778181712
 0.00061978088898559 0.00140091552591468
sym10: -0.00045932942100466 5.703608361849e-05 0.00459317358531183 -0.00080435893201654 -0.02035493981231129
 0.00576491203358191 0.04999497207737669 -0.0319900568824278 -0.03553674047381755 0.38382676106708546
 0.7695100370211071 0.47169066693843925 -0.07088053578324385 -0.15949427888491757 0.01160989390371138
 0.0459272392310922 -0.00146538258130505 -0.00864129927702242 9.563267072289e-05 0.00077015980911449
coif1: -0.07273261951252645 0.3378976624574818 0.8525720202116004 0.3848648468648578 -0.07273261951252645
 -0.01565572813579199
coif2: 0.01638733646320364 -0.04146493678687178 -0.0673725547237256 0.3861100668227629 0.8127236354494135
 0.4170051844232391 -0.07648859907828076 -0.05943441864643109 0.02368017194684777 0.00561143481936883
 -0.00182320887091103 -0.00072054944552035
coif3: -0.0037935128643808 0.00778259642567275 0.02345269614207717 -0.06577191128146936 -0.06112339000297255
 0.40517690240911824 0.7937772226260872 0.42848347637737 -0.07179982161915484 -0.08230192710629983 0.03455502757329774
 0.01588054486366945 -0.00900797613673062 -0.0025745176881368 0.00111751877083063 0.0004662169598204
 -7.098330250638e-05 -3.459977319727e-05
coif4: 0.000892313902537 -0.00162949242522679 -0.00734616793626805 0.01606894713157503 0.02668230466960483
 -0.08126671024919373 -0.05607731960356926 0.41530842700068227 0.7822389344242826 0.43438603311435653
 -0.06662747236681717 -0.09622042453595264 0.03933442260558915 0.02508225333794961 -0.01521172818769721
 -0.00565828380013088 0.00375143469714609 0.00126656107892566 -0.00058902022463322 -0.00025997433712226
 6.233885431279e-05 3.12298615992e-05 -3.25964794003e-06 -1.78499091449e-06
coif5: -0.00021208186206749 0.00035857774116176 0.00217829437784569 -0.00415931262757864 -0.01013158484690028
 0.02340832211892778 0.02816974427053235 -0.09192158806008609 -0.05204667025355476 0.42157126673075435
 0.7742936228603274 0.4379823066591634 -0.06203775157498196 -0.10556315130733723 0.04128753047211783
 0.03267479946705736 -0.01975839160096547 -0.00915950733867616 0.00676152022062042 0.00243157544253829
 -0.00166162730392988 -0.00063755892612588 0.00030185794166824 0.00014035632812373 -4.121986192427e-05
 -2.127022167252e-05 3.70072771134e-06 2.06122039858e-06 -1.6237995172e-07 -9.604010113e-08
"""


def _low(text: str) -> dict[str, tuple[float, ...]]:
    """Parse a table "family: number number …" into the numbers of each family."""
    families: dict[str, list[float]] = {}
    for word in text.split():
        if word.endswith(":"):
            families[word[:-1]] = numbers = []
        else:
            numbers.append(float(word))
    return {name: tuple(numbers) for name, numbers in families.items()}


# low-pass and high-pass filters of the synthesis, by family
LOW = _low(_TABLE)
HIGH = {name: tuple((-1) ** k * c for k, c in enumerate(reversed(low))) for name, low in LOW.items()}


class WaveFT(Spectral[WaveFTConfig]):
    """WaveFT, arXiv 2505.12532: ΔW = scaling · S M Tᵀ, where M is zero but at n places.

    S synthesizes its columns, T its rows, by a wavelet.
    """

    prefix = "waveft_"
    targets = WAVELET

    waveft_spectrum: nn.Parameter  # (n,)
    waveft_indices: Tensor  # (2, n), the places in M

    @classmethod
    def split_budget(cls, methods: Sequence[Method]) -> None:
        """With `proportional_parameters`, give each layer a copy of its config with its part of n times the number of
        layers, at least 1.

        The part is in proportion to out · fan_in.
        """
        cfgs = [m.cfg for m in methods]
        sizes = [m.site.out_features * m.site.fan_in for m in methods]
        for m, cfg, size in zip(methods, cfgs, sizes):
            if cfg.proportional_parameters:
                m.cfg = copy.copy(cfg)
                m.cfg.n_frequency = max(1, round(size / sum(sizes) * cfg.n_frequency * len(methods)))

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the parameter `waveft_spectrum` (n,) of zeros, the places `waveft_indices` (2, n), which no file
        holds, and facts.
        """
        cfg = self.cfg
        return dict(
            waveft_spectrum=nn.Parameter(torch.zeros(cfg.n_frequency)),
            waveft_indices=self.places(),
            waveft_n_frequency=cfg.n_frequency,
            waveft_scaling=cfg.scaling,
            waveft_random_loc_seed=cfg.random_loc_seed,
            waveft_wavelet_family=cfg.wavelet_family,
            waveft_use_idwt=cfg.use_idwt,
        )

    def init_values(self) -> None:
        """With `init_weights=False` fill the coefficients with normal values of std 0.01; else keep the zeros."""
        if not self.cfg.init_weights:
            self.waveft_spectrum.data.copy_(torch.randn(len(self.waveft_spectrum)) * 0.01)

    def basis(self, n: int) -> Basis:
        """Return the basis of vectors of n numbers: a `Wavelet` of the family; with `use_idwt=False` `Plain`, the
        entries themselves.
        """
        family = self.cfg.wavelet_family
        return Wavelet(n, LOW[family], HIGH[family]) if self.cfg.use_idwt else Plain(n)

    def transform(self) -> Sparse:
        """Return ΔW = scaling · S M Tᵀ as a `Sparse`, which is not formed until somebody needs it.

        The places are moved to the middle of the grid of coefficients, which may be larger than ΔW. With wavelets,
        their halves are exchanged as in PEFT.
        """
        site = self.site
        S, T = self.basis(site.out_features), self.basis(site.fan_in)
        u, v = self.waveft_indices  # in the middle of the grid of coefficients, which may be larger than ΔW
        u, v = u + (S.size - site.out_features) // 2, v + (T.size - site.fan_in) // 2
        if isinstance(S, Wavelet) and isinstance(T, Wavelet):  # details of the rows stand to the right, as in PEFT
            u, v = v // T.half * S.half + u % S.half, u // S.half * T.half + v % T.half
        return Sparse(self.cfg.scaling * self.waveft_spectrum[None], u, v, S, T, site.shape)
