"""GGUF's vector grids: which vectors of 8 (or 4) digits the types IQ1, IQ2 and IQ3 can store, and in which order.

A grid is a set of vectors of digits. Vector number v of base b has digits v // b^i % b, the first one least significant; the
grids hold their vectors in ascending order of that number, so the set says it all: a vector's index is how many of the set are
below it. Sets are stored as bitmaps (bit v: vector v is in), deflated, in base 85.

Source: the grids of ggml's ggml-common.h, as gguf 0.19.0 has them (gguf.quants.<type>.grid_hex); the golden vectors hold
every grid in full, as that package decodes it.
"""

import base64
import functools
import zlib

import torch

# name: (base, digits in a vector, the set)
GRIDS = {
    "IQ2_XXS": (3, 8,
        "c-nPRORB^$43oj#tB`je2YP^R=KfcCw)5@K5e=lV<VbEmf91ogR%p3E0BR^O#16P=^@J3)+t0mx___f>P^zDolEn6;is&dxI!#Zg_{KuzkVd4Mw`?l*l~*(z5~c8"
        "Qj-!-YZym34v`$TQ4<4*~)dpL;rq|+W4irx`d$&)6^vGb7UkLBrzcFbHqcf>sMFwRxr;MTG;*}m%Qlby-@@TSk)X7om@@#uKQIjUUWQ&$2&y}*gX5TV=Bc|Cuh1w"
        "L(2Kn3A3Yj<N%;gblzhT7_jxp@MF=lA5st5R^Hl2J=^JV`E{Z0D^#$6R7"),
    "IQ2_XS": (3, 8,
        "c-mc2TdsvL2pkgnkBRPwCicH3cK=&BJX-bM<{ZTW!^|+oxJIi-qkD|rsuaR~iB<*?x~C4>8J0pJW<V>X*vo#SY&(-c)w(<-fCU6QVt|)*=>oJ=N8h~B3mmYKBw*Y"
        ")Ca<s*uvOak7T*la5<g=kAh?T96(5+bR(Mt@J=L5^n!u1sF+~=p=RjVCGbM+vDH*59tF!>kC`)-u3GzO}jM8X_r-*1ytubG*&a^iqGs?p-do}D8x2NWXU?%O)=7t"
        "88q040RdJ=Ak)9T+$YBcFD31^6BC_W+mG1}iEA-T}Oj@u6-pQ1yByIl9%`W3mW#F%j~<yh(N0zSL~oH^Zy%}}tQx4=M73#xoc?jNErTmD?iDs40;(&MG>YYMNuDE"
        "=SK;cc#9vM%q_=>7msuqjC"),
    "IQ2_S": (3, 8,
        "c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>LAkBEEtarKv-X}c)kMD"
        "5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray(N$AzRb24)#*U9zYZZF^+2!@EVQ9?ARiEH!J<"
        "ErE8usn4?()-BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?joIO9P^#Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bX"
        "ep&HXz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+TBn!W(JyjC6"),
    "IQ1": (3, 8,
        "c-k#eK}(!R7=CxE;dM-9V?RN1diSfb(^(PgE$L;EU0C#DLh=VZ*|bQ>IZZw%yXlwN6ha`hG?#HO$v6$G@ldv(umMk2dT8mb2WdTox*h^v8VtnDuD#8?@Vw9Syw7v"
        "(LR2?w<}y}3b9YJG^C&5*&qs>Nl?x;NhAB!%0hRecnsm$a2YwJ@;QqccSPG~@n#@N5uBY$^gNY22s7}?HYgoxmY#Y+!Ajh1yxWA4l1OzVO1-XRyWBes^wA;LAoBq"
        "<x!%nuPhFWp9`{&R@7DG%<XIwD^Is3Q$Jf@<B<<hd(0^?jzIHG8vQn*?-$Ub(LsHW&@kYNcQ%|}dP%c;av8KJU^mWiJv*28-WD<$YEG%#}+D!ES;XeDuFD(VlG#i"
        "@A4$V;H%7rH52w&LB_pg1xSvl=L<CZ@9?{WdkSxbxSuMq|l64F4MqT|O(RS}O@H(bLXvHn!_OntvSw2GXTKiD_6XGLxujp0!)qyF+V=7Bv?g3oFy??D1-6?{(2le"
        "%HQrc>Le(m#@Cb_P%)g$;r#{<KcsUbe#9?p_<1{H>jE?+1SCIq;Fwj@yPMjA_U90?}vdY$)D1%>fQq-z{36HBT$I&mG*v%J#A~V%aSj@pZtCEAg}V1eou`2@uUxU"
        "_YQ=)6;l3U7EjmAKr#y2F0kdO91c}@u6ikZ68>90+)KINV7E3oVy0wcNC7Qg*Gnz$6Ckekcj5w;yQl$8BcV}uIeIA*;9XR~L2uzcrHYS+2)y-rqrtcg6e{stpn$c"
        "M#il(dTBx(R&0u-;P1DmAvG}u@dX;b%ns9v~6p49X^c}lqEMlIFjzJBbrp$X4T{{D_p5YV7e^~xM<^E7<_56qcAaL=FI+lT|4v2#Y&dpW2-Egd@Fdf5G@Dheeu*|"
        "v(bMFD;1sQ1"),
    "IQ3_XXS": (8, 4,
        "c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-c)&}FY<X@1m|7IGsjrX>q7@bAuHrcP3L2_"
        "`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5km%XvHjm=J(sMgqk-e3v^zjTJayVggoDWMJzT"
        "WE4a0T)3l-9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5"),
    "IQ3_S": (8, 4,
        "c-k#d!AiqG5PdVu!e&pqA>uXNMyUCUt<-~hDT4SrX{pfmmf{D9Rs{Q#&TgE;z`Qr}-rMBob#A|%IbF{W(Id*&Lkwq!%0~0(%@Ao{OU0lD_x2OXCI^OquXIKLt}o^"
        "pYnG?L6&oz+9HeSVPSrN(A}t!YmF^Xmp*3Qy-5G8(e|b5Y-VC?q(AA>+32wuC)HmEXp@c1}PT|h83}iuXSwt^ePGkv?U+Lf3a_=1ov?9@{igP&9v4ypFswx3&TJZ"
        "@M2_=SuX>*z&qp%+CoXl)ge8!drA@5Agyn!FG+()?*sDei}n1QT95(J|p-wR7#Aht{0!Hx!aZfy;cl!bD4D3uqR(zW`GY5;6>@R{_|3X$jRqNR^eu)^e<Ll^vCYl"
        "KPU1;QQ+o$IB(hKom+bHx0SXmXXwyZnVo8~6jd#wQ>"),
}  # fmt: skip


@functools.cache
def digits(name):
    """A grid's vectors in the order of their index: uint8 (vectors, digits).

    >>> digits("IQ3_S")[:3].tolist()
    [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
    """
    base, count, text = GRIDS[name]
    bitmap = int.from_bytes(zlib.decompress(base64.b85decode(text)), "little")
    numbers = torch.tensor([v for v in range(base**count) if bitmap >> v & 1])
    return torch.stack([numbers // base**i % base for i in range(count)], dim=-1).to(torch.uint8)


@functools.cache
def words(name):
    """digits(name) with each vector as one integer, a digit a byte: int64 (vectors,) for 8 digits, int32 for 4."""
    table = digits(name)
    return table.view(torch.int64 if table.shape[-1] == 8 else torch.int32).squeeze(-1)


@functools.cache
def indices(name):
    """The inverse of digits: int32 (2^(bits * digits),), the index of each vector by its number in base 2^bits; -1 where there is none."""
    table = digits(name)
    bits, count = digit_bits(name), table.shape[-1]
    index = torch.full((2 ** (bits * count),), -1, dtype=torch.int32)
    index[number(table, bits)] = torch.arange(len(table), dtype=torch.int32)
    return index


def digit_bits(name):
    """Bits that a digit of the grid takes."""
    return (GRIDS[name][0] - 1).bit_length()


def number(vectors, bits):
    """The number of each vector (..., digits) in base 2^bits, the first digit least significant: int64 (...)."""
    return sum(vectors[..., i].long() << (bits * i) for i in range(vectors.shape[-1]))
