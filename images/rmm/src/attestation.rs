//! The realm attestation key and the platform token, fetched from EL3 once, while the primary boots.

use crate::el3;
use cca_abi::rmm_el3::{CURVE_P384, Status, fid, version_major, version_minor};
use core::cell::UnsafeCell;
use rmm::{Attestation, Comb, PLATFORM_TOKEN_MAX};

const PAGE: usize = 4096;
const KEY: usize = 48;
/// How often a service may ask to be called again.
const PATIENCE: u32 = 1 << 20;

/// What stays.
struct Kept<T>(UnsafeCell<T>);
// SAFETY: written by the primary during its cold boot only, before anybody reads it.
unsafe impl<T: Sync> Sync for Kept<T> {}

static TOKEN: Kept<[u8; PLATFORM_TOKEN_MAX]> = Kept(UnsafeCell::new([0; PLATFORM_TOKEN_MAX]));
static TABLE: Kept<Comb> = Kept(UnsafeCell::new(Comb::EMPTY));

/// Calls a service whose buffer is the whole shared page; `x1`, which is at most a page, and `x2`.
fn call(fid: u64, shared: u64, argument: u64) -> Option<(usize, u64)> {
    for _ in 0..PATIENCE {
        match el3::call(fid, shared, PAGE as u64, argument) {
            [0, len, more] => {
                let len = usize::try_from(len).ok().filter(|&len| len != 0 && len <= PAGE)?;
                return Some((len, more));
            }
            [status, ..] if status == Status::Again.to_register() => {}
            _ => return None,
        }
    }
    None
}

/// Asks EL3 for both.
///
/// # Safety
/// Called by the primary during its cold boot; the page at `shared` is mapped and nobody else uses it.
pub(crate) unsafe fn fetch(shared: u64, version: u64) -> Result<Attestation<'static>, &'static str> {
    let page = shared as *mut u8;
    let (len, _) = call(fid::ATTEST_GET_REALM_KEY, shared, CURVE_P384).ok_or("EL3 gives no key")?;
    let mut key = [0; KEY];
    // SAFETY: inside of the page; EL3 has written the key there and is not running.
    unsafe {
        core::ptr::copy_nonoverlapping(page, key.as_mut_ptr(), KEY);
        core::ptr::write_bytes(page, 0, PAGE);
    }
    // SAFETY: the primary is alone; this is the only reference.
    let attestation = Attestation::new(&key, unsafe { &mut *TABLE.0.get() }).filter(|_| len == KEY);
    for byte in &mut key {
        // SAFETY: a plain store that the compiler may not leave out.
        unsafe { core::ptr::write_volatile(byte, 0) };
    }
    let mut attestation = attestation.ok_or("EL3's key is none of P-384")?;

    // Before interface 0.3 the token came in one piece.
    let hunks = version_major(version) != 0 || version_minor(version) >= 3;
    let challenge = attestation.challenge();
    // SAFETY: the primary is alone.
    let token = unsafe { &mut *TOKEN.0.get() };
    let mut end = 0;
    // SAFETY: as above.
    unsafe { core::ptr::copy_nonoverlapping(challenge.as_ptr(), page, challenge.len()) };
    let mut argument = challenge.len() as u64;
    loop {
        let (len, more) = call(fid::ATTEST_GET_PLAT_TOKEN, shared, argument).ok_or("EL3 gives no token")?;
        let room = token.get_mut(end..end + len).ok_or("the platform token is too long")?;
        // SAFETY: `len` bytes of the page, which EL3 has written.
        unsafe { core::ptr::copy_nonoverlapping(page, room.as_mut_ptr(), len) };
        end += len;
        if !hunks || more == 0 {
            break;
        }
        argument = 0;
    }
    // SAFETY: `token` is not used any more.
    let token: &'static [u8] = unsafe { &*TOKEN.0.get() };
    attestation.set_platform_token(&token[..end]);
    Ok(attestation)
}
