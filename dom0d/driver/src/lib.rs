//! How an engine and a data plane are kept in step: outputs are carried out in the engine's order, and before anything may
//! depose the OVM the plane is stopped and everything that it passed is heard (rules 1 and 2).
//!
//! The daemon, the simulator and the fuzzers implement [`Driven`] and call the functions here, so that all of them play the
//! same protocol between engine and plane:
//!
//! 1. hand the engine an input, then [`drain`];
//! 2. what may depose the OVM goes through [`cut_over`] instead;
//! 3. when no input is left, [`settle`].

use understudy_protocol::{
    Command, Evidence, Input, Instant, OperatorError, Output, Rule, ServerId, Service,
};

/// Packets and handovers carried out in one go before others have their turn.
const BURST: u32 = 256;

/// An engine, or what stands for one.
pub trait Engine {
    /// See [`Service::handle`].
    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), OperatorError>;

    /// Hands over an input that is no [`Input::Command`], which is never refused.
    fn tell(&mut self, now: Instant, input: Input<'_>) {
        let result = self.handle(now, input);
        debug_assert_eq!(result, Ok(()), "only a command can be refused");
    }

    /// Asks for what only the engine can grant; see [`Input::Command`].
    fn command(&mut self, now: Instant, command: Command) -> Result<(), OperatorError> {
        self.handle(now, Input::Command(command))
    }

    /// See [`Service::poll`].
    fn poll(&mut self, now: Instant) -> Option<Output>;

    /// It was polled `count` times, and what came of that was carried out.
    fn polled(&mut self, _now: Instant, _count: u32) {}

    /// A cutover begins, or is over: meanwhile nothing else should take time.
    fn set_urgent(&mut self, _urgent: bool) {}

    /// The engine itself, to be looked at.
    fn service(&self) -> &Service;
}

impl Engine for Service {
    fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), OperatorError> {
        self.handle(now, input)
    }

    fn poll(&mut self, now: Instant) -> Option<Output> {
        self.poll(now)
    }

    fn service(&self) -> &Service {
        self
    }
}

/// What the engine found against its OVM while the plane was passing by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// Against whom.
    pub accused: ServerId,
    /// What.
    pub evidence: Evidence,
}

/// An engine and what its outputs act upon: a data plane, domains, whoever listens.
pub trait Driven {
    /// The engine.
    type Engine: Engine;

    /// The engine.
    fn engine(&mut self) -> &mut Self::Engine;

    /// Where the driver keeps the suspicion that [`settle`] is to act upon.
    fn suspicion(&mut self) -> &mut Option<Suspicion>;

    /// Whether outputs can be carried out now; they wait otherwise.
    fn is_ready(&self) -> bool {
        true
    }

    /// Carries out any output but [`Output::StopPlane`], which is the driver's.
    fn carry_out(&mut self, output: Output);

    /// Has the plane pass nothing by itself and take nobody for the OVM, until [`Output::Cutover`] or [`Driven::resume`].
    /// `false` if it never passes anything by itself, or was stopped already.
    fn stop(&mut self) -> bool;

    /// Tells the engine of the next packet that came before the plane was stopped, passed or not; `false` if there is none
    /// left.
    fn hear_rest(&mut self, now: Instant) -> bool;

    /// The plane was stopped, and no cutover followed: if it still is, it takes this server for the OVM again.
    fn resume(&mut self, ovm: Option<ServerId>);

    /// Everything that the plane had for the engine was handed over.
    fn is_idle(&self) -> bool;
}

/// Carries out what the engine wants done; `true` if more waits.
pub fn drain(driven: &mut impl Driven, now: Instant) -> bool {
    if !driven.is_ready() {
        return false;
    }
    let (mut count, mut left) = (0, BURST);
    while left > 0 {
        count += 1;
        match driven.engine().poll(now) {
            Some(Output::StopPlane { accused, evidence }) => {
                *driven.suspicion() = Some(Suspicion { accused, evidence });
            }
            Some(output) => {
                if matches!(output, Output::Transmit(_) | Output::Rule(Rule::HandOver(_))) {
                    left -= 1;
                }
                driven.carry_out(output);
            }
            None => break,
        }
    }
    driven.engine().polled(now, count);
    left == 0
}

/// Stops the plane, has the engine hear everything that it passed, and hands the engine an input that may depose the OVM, if
/// there is one: it must know of every byte that clients have.
pub fn cut_over(
    driven: &mut impl Driven,
    now: Instant,
    input: Option<Input<'_>>,
) -> Result<(), OperatorError> {
    driven.engine().set_urgent(true);
    if driven.stop() {
        while driven.hear_rest(now) {
            drain(driven, now);
        }
        driven.engine().tell(now, Input::PlaneStopped);
    }
    let result = input.map_or(Ok(()), |input| driven.engine().handle(now, input));
    drain(driven, now);
    let ovm = driven.engine().service().ovm();
    driven.resume(ovm);
    driven.engine().set_urgent(false);
    result
}

/// Acts upon what the engine found, then lets the plane pass what it may. To be called when every input at hand was handed
/// over.
pub fn settle(driven: &mut impl Driven, now: Instant) {
    if let Some(Suspicion { accused, evidence }) = driven.suspicion().take() {
        let result = cut_over(driven, now, Some(Input::Confirmed { accused, evidence }));
        debug_assert_eq!(result, Ok(()), "only a command can be refused");
        // What was found on the way is about an OVM that has been judged.
        *driven.suspicion() = None;
    }
    if driven.is_idle() && driven.engine().service().wants_to_hand_over() {
        driven.engine().tell(now, Input::PlaneIdle);
        drain(driven, now);
    }
}
