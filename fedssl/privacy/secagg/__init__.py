"""Secure aggregation: a server that learns the sum of its clients' vectors and nothing else of any of them.

The protocol is that of Bonawitz et al. 2017 (https://eprint.iacr.org/2017/281) against an honest but curious server:
every pair of clients shares a mask that cancels in the sum, every client adds one of its own, and shares of the secrets
behind them let the others finish for those who drop out. Four exchanges:

    advertise keys -> share keys -> masked vector -> unmask

`participant` is a client's side, `collector` the server's, `simulate` both in one function. The order in which to read:
`keys`, `participant`, `collector`, then how real numbers become residues (`fixed_point`) and how noise is added to them
(`discrete_gaussian`, `accounting`).
"""
