//! Policies of IPsec, as the kernel lists them (xfrm).
//!
//! In: the kernel's answers, or nothing where it has no IPsec. Out: whether a policy, or what holds without one,
//! says how clients come in or are answered: the kernel path passes all of that by. Those of tunnels that are interfaces, or for
//! packets with a mark, concern nobody else. Invariant: answers that are cut or make no sense are no policy.

use rustix::io::Errno;
use rustix::net::netlink::XFRM;
use shared::netlink::NLM_F_DUMP;

use super::netlink::{ask, attributes, whole};

// linux/xfrm.h
const GET_POLICY: u16 = 0x15;
const GET_DEFAULT: u16 = 0x28;
/// The fourth group: changes of policies.
pub const CHANGES: u32 = 1 << 3;
/// `struct xfrm_userpolicy_info`, and where its direction and action are.
const POLICY: usize = 168;
const DIRECTION: usize = 160;
const ACTION: usize = 161;
const IN: u8 = 0;
const OUT: u8 = 1;
const BLOCK: u8 = 1;
/// `struct xfrm_userpolicy_default`, where those for what comes in and what leaves are: XFRM_USERPOLICY_BLOCK
/// has the number of a policy's own action.
const DEFAULTS: [usize; 2] = [0, 2];
const XFRMA_TMPL: u16 = 5;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;

/// Whether a policy wants anybody's packets to or from this host encrypted, or stops them.
fn decides(body: &[u8]) -> bool {
    let byte = |at: usize| body.get(at).copied();
    let (mut encrypts, mut is_special) = (false, false);
    for (kind, value) in attributes(body.get(POLICY..).unwrap_or_default()) {
        match kind {
            XFRMA_TMPL => encrypts |= !value.is_empty(),
            // Of a mark the value comes first, then the bits that count.
            XFRMA_MARK => is_special |= value.get(..4).is_some_and(|it| it != [0; 4]),
            XFRMA_IF_ID => is_special |= value != [0; 4],
            _ => {}
        }
    }
    let stops = byte(ACTION) == Some(BLOCK);
    matches!(byte(DIRECTION), Some(IN | OUT)) && (encrypts || stops) && !is_special
}

/// Whether what no policy is about is stopped.
fn stops_the_rest(body: &[u8]) -> bool {
    DEFAULTS.iter().any(|at| body.get(*at) == Some(&BLOCK))
}

/// Whether there is such a policy.
///
/// # Errors
/// The kernel has no IPsec, or does not let us look, or policies change all the time.
pub fn decides_about_clients() -> Result<bool, Errno> {
    let found = whole(|| {
        let mut found = false;
        ask(XFRM, GET_POLICY, NLM_F_DUMP, |body| found |= decides(body))?;
        Ok(found)
    })?;
    let mut stops = false;
    match ask(XFRM, GET_DEFAULT, 0, |body| stops |= stops_the_rest(body)) {
        // Before Linux 5.15 nothing says so.
        Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(found || stops),
        Err(_) if found => Ok(true),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(direction: u8, action: u8, rest: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; POLICY];
        (body[DIRECTION], body[ACTION]) = (direction, action);
        for (kind, value) in rest {
            let length = u16::try_from(value.len() + 4).unwrap();
            body.extend(length.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
        }
        body
    }

    #[test]
    fn policies_that_encrypt_or_stop_what_comes_and_goes_decide() {
        let template: (u16, &[u8]) = (XFRMA_TMPL, &[0; 64]);
        assert!(decides(&policy(OUT, 0, &[template])));
        assert!(decides(&policy(OUT, BLOCK, &[])));
        assert!(decides(&policy(IN, 0, &[template])) && decides(&policy(IN, BLOCK, &[])));
        assert!(decides(&policy(
            OUT,
            0,
            &[(XFRMA_IF_ID, &[0; 4]), template]
        )));
        for (direction, rest) in [
            (OUT, vec![]),
            (OUT, vec![(XFRMA_TMPL, &[][..])]),
            (OUT, vec![template, (XFRMA_IF_ID, &[0, 0, 0, 1])]),
            (
                OUT,
                vec![template, (XFRMA_MARK, &[42, 0, 0, 0, 255, 255, 255, 255])],
            ),
            (IN, vec![]),
            (2, vec![template]),
        ] {
            assert!(
                !decides(&policy(direction, 0, &rest)),
                "{direction} {rest:?}"
            );
        }
    }

    #[test]
    fn what_holds_without_a_policy_decides_where_it_stops_clients() {
        const ACCEPT: u8 = 2;
        assert!(stops_the_rest(&[BLOCK, 0, 0]) && stops_the_rest(&[ACCEPT, 0, BLOCK]));
        for others in [&[0, 0, 0][..], &[ACCEPT, BLOCK, ACCEPT], &[]] {
            assert!(!stops_the_rest(others), "{others:?}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_ends_the_process(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = (decides(&bytes), stops_the_rest(&bytes));
        }
    }
}
