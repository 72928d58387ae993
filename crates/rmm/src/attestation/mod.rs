//! RSI_ATTESTATION_TOKEN_INIT and _CONTINUE.
//!
//! INIT samples what the token is about; CONTINUE signs in slices until an interrupt is pending, then hands the
//! token out, window by window. All of it is in the REC object, which only the CPU that runs the REC touches; no
//! lock is held while signing.

mod curve;
mod sign;
mod token;

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cca_abi::rsi::Status;
use sha2::{Digest as _, Sha256, Sha384};

use crate::Rmm;
use crate::granule::State;
use crate::measurement::Measurement;
use crate::platform::{GRANULE_SIZE, Page, Platform};
use crate::rsi::{absent, answer, error};
use crate::run::{Flow, Run};
pub use curve::Comb;
use sign::{Progress, Signer};
use token::Token;

/// A platform token may be this long.
pub const PLATFORM_TOKEN_MAX: usize = 8192;

/// The realm attestation key, and the token in which the platform vouches for it.
pub struct Attestation<'m> {
    signer: Signer<'m>,
    platform_token: &'m [u8],
}

impl<'m> Attestation<'m> {
    /// The key is a P-384 private scalar, big-endian; the table is filled. `None` if it is not such a key.
    pub fn new(private_key: &[u8; 48], table: &'m mut Comb) -> Option<Self> {
        Some(Self { signer: Signer::new(private_key, table)?, platform_token: &[] })
    }

    /// The challenge that binds the platform token to the key: SHA-256 of the public key as COSE_Key.
    pub fn challenge(&self) -> [u8; 32] {
        Sha256::digest(self.signer.key()).into()
    }

    /// Sets the platform token for [`Self::challenge`].
    pub fn set_platform_token(&mut self, token: &'m [u8]) {
        self.platform_token = token;
    }
}

/// Words of a token in progress, in the REC object.
mod word {
    use super::sign;
    /// Not zero: ATTEST_IN_PROGRESS.
    pub(super) const IN_PROGRESS: usize = 0;
    /// Bytes handed out.
    pub(super) const SENT: usize = 1;
    pub(super) const CHALLENGE: usize = 2;
    pub(super) const REMS: usize = CHALLENGE + 8;
    pub(super) const SIGNING: usize = REMS + 32;
    pub(super) const END: usize = SIGNING + sign::WORDS;
}

/// Words that a REC keeps for its token.
pub(crate) const WORDS: usize = word::END;

/// A REC's attestation state.
pub(crate) struct AttestState<'a> {
    words: &'a [AtomicU64; WORDS],
}

impl<'a> AttestState<'a> {
    /// The state in `words`; all zero is NO_ATTEST_IN_PROGRESS.
    pub(crate) fn new(words: &'a [AtomicU64; WORDS]) -> Self {
        Self { words }
    }

    /// The words from `at` on.
    fn words(&self, at: usize) -> &[AtomicU64] {
        self.words.get(at..).unwrap_or_default()
    }

    fn set_in_progress(&self) {
        self.words[word::IN_PROGRESS].store(1, Relaxed);
    }

    fn in_progress(&self) -> bool {
        self.words[word::IN_PROGRESS].load(Relaxed) != 0
    }

    fn sent(&self) -> u64 {
        self.words[word::SENT].load(Relaxed)
    }

    fn set_sent(&self, bytes: u64) {
        self.words[word::SENT].store(bytes, Relaxed);
    }

    fn challenge(&self) -> [u64; 8] {
        read(self.words(word::CHALLENGE))
    }

    fn set_challenge(&self, challenge: &[u64; 8]) {
        write(self.words(word::CHALLENGE), challenge);
    }

    fn rems(&self) -> [Measurement; 4] {
        let mut rems = [Measurement::default(); 4];
        for (to, from) in rems.iter_mut().zip(self.words(word::REMS).chunks_exact(8)) {
            *to = read(from);
        }
        rems
    }

    fn set_rems(&self, rems: &[Measurement; 4]) {
        for (to, from) in self.words(word::REMS).chunks_exact(8).zip(rems) {
            write(to, from);
        }
    }

    fn progress(&self) -> Progress<'a> {
        let (_, words) = self.words.split_at(word::SIGNING);
        // The words end where signing ends: there are as many.
        let Some(words) = words.first_chunk() else { unreachable!() };
        Progress::new(words)
    }

    fn wipe(&self) {
        for word in self.words {
            word.store(0, Relaxed);
        }
    }
}

fn read(words: &[AtomicU64]) -> [u64; 8] {
    let mut values = [0; 8];
    for (to, from) in values.iter_mut().zip(words) {
        *to = from.load(Relaxed);
    }
    values
}

fn write(words: &[AtomicU64], values: &[u64; 8]) {
    for (to, &from) in words.iter().zip(values) {
        to.store(from, Relaxed);
    }
}

/// Writes a part of a stream of bytes into a page.
struct Window<'p> {
    page: &'p Page,
    /// The first byte in the page.
    offset: u64,
    /// The part of the stream that is wanted.
    from: u64,
    to: u64,
    /// Bytes of the stream so far.
    at: u64,
}

impl Window<'_> {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if (self.from..self.to).contains(&self.at) {
                let at = self.offset.wrapping_add(self.at).wrapping_sub(self.from);
                // Below the page's size.
                let word = &self.page[(at / 8) as usize % self.page.len()];
                let shift = at % 8 * 8;
                word.store(word.load(Relaxed) & !(0xFF << shift) | u64::from(byte) << shift, Relaxed);
            }
            self.at = self.at.wrapping_add(1);
        }
    }
}

impl<'m, P: Platform> Rmm<'m, P> {
    /// Gives the RMM a key and a platform token. Without them RSI_ATTESTATION_TOKEN_CONTINUE fails with
    /// RSI_ERROR_UNKNOWN.
    pub fn set_attestation(&mut self, attestation: Attestation<'m>) {
        self.attestation = Some(attestation);
    }

    /// What the token in progress says.
    fn token<'a>(
        &'a self,
        attestation: &'a Attestation<'_>,
        run: &Run<'_>,
        state: &AttestState<'_>,
    ) -> Token<'a> {
        Token {
            platform_token: attestation.platform_token,
            key: attestation.signer.key(),
            algorithm: run.realm.hash(),
            challenge: state.challenge(),
            rpv: run.realm.rpv(),
            // Never changes once the Realm is active.
            rim: run.realm.measurement(0),
            rems: state.rems(),
        }
    }

    /// RSI_ATTESTATION_TOKEN_INIT.
    pub(crate) fn token_init(&self, run: &Run<'_>) -> Flow {
        let state = run.rec.attest_state();
        state.wipe();
        state.set_challenge(&core::array::from_fn(|n| run.ctx.gpr(n.wrapping_add(1))));
        let rems: [Measurement; 4] = {
            let _rd = self.lock_owned(run.rd, State::Rd);
            core::array::from_fn(|n| run.realm.measurement(n.wrapping_add(1)))
        };
        state.set_rems(&rems);
        state.set_in_progress();
        let bound = self.attestation.as_ref().map_or(0, |it| self.token(it, run, &state).len());
        answer(run, Status::Success, [bound, 0, 0])
    }

    /// RSI_ATTESTATION_TOKEN_CONTINUE.
    pub(crate) fn token_continue(&self, run: &mut Run<'_>) -> Flow {
        let [addr, offset, size] = [1, 2, 3].map(|n| run.ctx.gpr(n));
        if addr % GRANULE_SIZE != 0
            || !run.stage2.is_protected(addr)
            || offset >= GRANULE_SIZE
            || offset.checked_add(size).is_none_or(|end| end > GRANULE_SIZE)
        {
            return error(run, Status::ErrorInput);
        }
        let state = run.rec.attest_state();
        if !state.in_progress() {
            return error(run, Status::ErrorState);
        }
        let Some(attestation) = &self.attestation else { return error(run, Status::ErrorUnknown) };
        let token = self.token(attestation, run, &state);
        let progress = state.progress();
        let signature = loop {
            if let Some(signature) = progress.signature() {
                break signature;
            }
            attestation.signer.slice(&progress, || {
                let mut hash = Sha384::new();
                token.to_be_signed(&mut |bytes| hash.update(bytes));
                hash.finalize()
            });
            if self.platform.interrupt_pending() {
                // The interrupt ends this run as soon as the REC is entered again: before its next instruction.
                return answer(run, Status::Incomplete, [0; 3]);
            }
        };

        let (from, all) = (state.sent(), token.len());
        let to = all.min(from.wrapping_add(size));
        let written = self.with_realm_page(&run.stage2, addr, |page, _| {
            let mut window = Window { page, offset, from, to, at: 0 };
            token.write(&signature, &mut |bytes| window.write(bytes));
        });
        if let Err(why) = written {
            return absent(run, addr, why);
        }
        if to < all {
            state.set_sent(to);
            return answer(run, Status::Incomplete, [to.wrapping_sub(from), 0, 0]);
        }
        state.wipe();
        answer(run, Status::Success, [to.wrapping_sub(from), 0, 0])
    }
}
