"""An LMDB of pickles, as TAPE and PEER give them."""

import base64
import gzip

_STORED = (
    "ABzY8000000t4-x%}>){9LJw_8ym}Ti!n^22aj+e3>Ytok(VhiR+a$9V1mvv3Txb3+Rlj4gbON3Z#-V7C(j-^8U7N(fwOut+_YW0"
    "0m2@sDFW&Db13DLrcc{_^K1KbeMU%~P;L5k`}-G;9Kv6l#_CJ3`DH^+NPT&Z00000000000N}LXPWAquZ>-;UXk~=79cq=3)+5^k"
    "00000000000Jq=|%v~i5f%&%2;g--s;Ab!$z|jHcfe*Zu&qVi{|2?%6`<iy>!LlM3L}iug@oC|~=%cAoVP<w_YHs|YFgH0qH#;*;"
    "^-E=?q)Boylb4DsT8;{FotKxW&L_I59?6%oVqShJYI3Pa_4Z<=P+slIWJ`+FRjA}OSyU9!Sbd9XEG8;+lj?!mGREH}ZM7_!hL;EF"
    "#=Ez4mUaj}ox4TT>GVCb53Dv3h(;Gvjjl8L##l~|s+zbc=Vfg*qneG;Tu_f>6e(LOs+v;CYQ}nVVLez}vNm9o3S^z8xJ7C;!wK9v"
    "%|&#6xo^MeT<mDW8!0~_H%F*3tH<)CmCSO!Vzj4brD9g1kLkq76>Gah-KVO(G#AfZGn>j?uQwDo{)uj+w(2{;9Vr~=+t+qI{M`7I"
    "mof!Web!_bjbpi(IQTKXqQ@Q0ICnf|E0r!%<*lasjG%7vjoc=j<~H3lw<$i6_@BAu&M>##tlYLEx9;T@6&4ltVpZ5gt-?A8YN~lj"
    "<vdeS*KRk@>F^G6>V8hUo#u43c|qkoQ%~&=>)4#uw+lISBd5Mb^Zweic_XfK$z$R=-x(mJ$t3_REG#UnZSNjEhfj9~?2FA_uUu@7"
    "3^Oh^_t+<K<8al^;$xGY=l_Ha4-XFy4-XFy4-XFy4-XFy4-XFy4-XFy4-XFy4-XFy4-XFy4-XH2TK?}Z7Fb`qJlUHCW9AzH8~^|S"
    "HumdQ00000005jR!Nwd<ZjdT(j{g@5Jq>K}RUStNoGsQ6lo3*_6f)8au~5!S>Y87O?2oT9<aB(M`;2jbhP?7>c8oP%)n#kDFusbL"
    ";{Xjh&8ff`2WZeU;{dU88beOq&*^~EoK7+7>3~=2=?-J4i;)O&>V8i9o#u3sQBV85Qct&8ISnDF?&mb=G^Z1cdYbe~J^jeasUJCY"
    "FQ=gc&9{@?=w5U;`Ynn(PXGV_000000N|q0YTw`Y*iZX8l5BK7v^JLFjr;#<c)o4Ctr|9e{qGZ={{sNPi8=iHf0jE@um3pX=~SOr"
    "o=&Z?dj0L~La)CYz5Y*<X2Trm_5GRL9;eB@!$@wAXTGPx`l*W_NbbKT7xfhN^a9jV4)qlE^kQBK{01rs?7sk@000"
)
"""data.mdb by liblmdb 0.9.24, gzip and base85: twelve proteins pickled by protocol 4, the fourth on pages of its own,
and `num_examples`."""
STORED = gzip.decompress(base64.b85decode(_STORED))
